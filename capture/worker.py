"""A step of structure from motion by pycolmap, as a process of its own: worker.py STEP '{"option": ...}'.

Its own process, because pycolmap brings libraries that do not get along with those of Pillow and torch,
because what it crashes on should not take us along, and because its memory is given back afterwards.
"""

import json
import sys

import pycolmap  # pyright: ignore[reportMissingImports]


def features(database, photos, groups, model, threads, max_size, max_features, gpu):
    """groups: lists of names that share a camera each."""
    reader = pycolmap.ImageReaderOptions(camera_model=model)
    extraction = pycolmap.FeatureExtractionOptions(num_threads=threads, max_image_size=max_size)
    extraction.sift.max_num_features = max_features
    for names in groups:
        pycolmap.extract_features(
            database,
            photos,
            image_names=names,
            camera_mode=pycolmap.CameraMode.SINGLE,
            reader_options=reader,
            extraction_options=extraction,
            device=_device(gpu),
        )


def match(database, matcher, vocab_tree, gpu):
    if matcher == "exhaustive":
        pycolmap.match_exhaustive(database, device=_device(gpu))
    elif matcher == "sequential":
        options = pycolmap.SequentialPairingOptions(overlap=10, loop_detection=bool(vocab_tree))
        if vocab_tree:
            options.vocab_tree_path = vocab_tree
        pycolmap.match_sequential(database, pairing_options=options, device=_device(gpu))
    else:
        options = pycolmap.VocabTreePairingOptions(vocab_tree_path=vocab_tree)
        pycolmap.match_vocabtree(database, pairing_options=options, device=_device(gpu))


def reconstruct(database, photos, output, mapper, tolerance, seed):
    if mapper == "global":
        pycolmap.global_mapping(database, photos, output)
        return
    options = pycolmap.IncrementalPipelineOptions(ba_global_function_tolerance=tolerance, random_seed=seed)
    pycolmap.incremental_mapping(database, photos, output, options=options)


def undistort(photos, model, output, threads):
    pycolmap.undistort_images(output, model, photos, num_threads=threads, jpeg_quality=95)


def _device(gpu):
    return pycolmap.Device.auto if gpu else pycolmap.Device.cpu


if __name__ == "__main__":
    pycolmap.logging.minloglevel = 0
    pycolmap.logging.alsologtostderr = True
    globals()[sys.argv[1]](**json.loads(sys.argv[2]))
