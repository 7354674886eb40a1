// stages.h: the CUDA backend as a list of stages, in the order in which a training step runs them.
//
//   catch_up              brings rows that have waited up to date
//   preprocess            Gaussians -> screen-space splats, radii, depth keys, tile counts
//   begin_lists           the number of entries, for the host
//   sort_by_key           indices, front to back
//   emit                  one entry (tile, splat) per tile that a splat can reach, front to back
//   sort_by_tile          entries grouped by tile, still front to back; the range of each tile
//   blend_forward         entries -> image
//   photometric_loss      image -> loss and its gradient
//   blend_backward        gradient of the image -> gradient of every splat
//   preprocess_backward   gradient of every splat -> gradients of the Gaussians and the camera
//   adam                  the step. preprocess_backward_adam is both in one, for the fused training step
//
// Where several processes hold the Gaussians, append and unpack stand between preprocess and begin_lists, and
// dealt_backward_adam is the last stage.
//
// Every pointer is to device memory unless it says otherwise. A stage only enqueues work on `stream` and throws
// std::runtime_error when CUDA reports an error. Nothing here allocates: buffers come from the caller.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../common/args.h"
#include "../common/constants.h"

namespace gs::cuda {

using Stream = void*;  // cudaStream_t

// A Gaussian seen from the camera: 48 bytes, read as three float4.
struct alignas(16) Splat {
    float x, y;                // pixels
    float extent_x, extent_y;  // |dx|, |dy| beyond which alpha < 1/255; negative: nowhere visible
    float xx, xy, yy;          // log2(alpha) = xx dx^2 + xy dx dy + yy dy^2 + log2_opacity
    float log2_opacity;
    float r, g, b, inv_depth;
};

// What the backward of blending collects for a splat: sums over its pixels, with g = dLoss / dlog(alpha).
constexpr int kGradSize = 12;
enum GradSlot { kG, kGx, kGy, kGxx, kGxy, kGyy, kRed, kGreen, kBlue, kInvDepth, kAbsX, kAbsY };

// Of one view, or of several of the same size, one after the other. These are drawn as one: their splats, tiles and
// pixels are numbered through, [C, N], [C, tiles] and [C, H, W], so that every stage is still a single launch.
struct TileGrid {
    int width, height;     // pixels of a view
    int tiles_x, tiles_y;  // of a view
    int views;
    TileGrid(int w, int h, int count = 1)
        : width(w),
          height(h),
          tiles_x((w + kTileSize - 1) / kTileSize),
          tiles_y((h + kTileSize - 1) / kTileSize),
          views(count) {}
    int tiles() const { return views * tiles_x * tiles_y; }
    int64_t pixels() const { return int64_t(views) * width * height; }
};

struct Totals {  // zeroed by preprocess, which counts
    unsigned long long entries;
    unsigned long long visible;
    unsigned long long large;     // counted by emit: splats in more than kMaskTiles tiles
    unsigned long long segments;  // counted by blend_forward
};

// The tiles that a splat can reach, as found by preprocess: emit writes them down without asking again. One 16-byte load.
struct alignas(16) TileSet {
    uint16_t x0, y0;         // first tile of the rectangle
    uint16_t columns, rows;  // its size
    uint32_t mask;           // up to kMaskTiles tiles: bit y columns + x is set where the splat reaches; else emit's
    uint32_t count;          // tiles reached
};
constexpr int kMaskTiles = 32;

struct Screen {
    Splat* splats;         // [N]  only where radius > 0
    int32_t* radii;        // [N]
    uint32_t* depth_keys;  // [N]  ascending with depth; kCulledKey where radius = 0
    uint32_t* indices;     // [N]  0, 1, 2, ...
    TileSet* tile_sets;    // [N]  only where radius > 0
    Totals* totals;        // [1]
};
constexpr uint32_t kCulledKey = 0x7fffffffu;
constexpr int64_t kMaxEntries = INT32_MAX;  // (tile, splat) pairs of one image; the sort counts in 32 bits

// Of several views, world_to_camera is [views, 4, 4], and N below is views times the number of Gaussians.
void preprocess(const Gaussians<float>& gaussians, const View<float>& view, const Screen& out, Stream stream,
                int views = 1);

// Stable radix sort of (key, index), where no key has its highest bit. `workspace` of key_sort_workspace(N) bytes.
size_t key_sort_workspace(int64_t count);
void sort_by_key(int64_t count, const uint32_t* keys, uint32_t* keys_out, const uint32_t* indices,
                 uint32_t* indices_out, void* workspace, size_t workspace_bytes, Stream stream);

// What the stages that follow want to find zero; and totals->entries, if wanted, to where the host reads it.
struct BeginLists {
    int64_t count;  // N
    TileGrid grid;
    const Totals* totals;  // [1]
    uint64_t* published;   // [emit_blocks(N)]
    uint32_t* ranges;      // [tiles, 2]
    int64_t* entries;      // [1] in pinned memory, or null
};
void begin_lists(const BeginLists& args, Stream stream);

// Tile ids take 16 bits where they fit: half the bytes to sort.
inline bool small_tile_ids(const TileGrid& grid) { return grid.tiles() < 65536; }
inline size_t tile_id_bytes(const TileGrid& grid) { return small_tile_ids(grid) ? 2 : 4; }

// Where the host does not know the number of entries, `capacity` is a guess: entries beyond it, which are the farthest,
// are dropped (totals->entries tells), and room to spare is filled with tile number grid.tiles(), which sorts last.
struct Emit {
    int64_t count;                // N
    const uint32_t* depth_order;  // [N]
    TileSet* tile_sets;           // [N]
    const Splat* splats;          // [N]
    Totals* totals;               // [1]
    TileGrid grid;
    int64_t capacity;
    void* tiles;          // [capacity] uint16 or uint32, see tile_id_bytes
    uint32_t* ids;        // [capacity] index of the splat
    uint32_t* offsets;    // [N] by rank in depth order: a splat's first entry; or null
    uint32_t* large;      // [N] room for the ids of large splats
    uint64_t* published;  // [emit_blocks(N)] zero on entry
};
int64_t emit_blocks(int64_t count);
void emit(const Emit& args, Stream stream);

size_t tile_sort_workspace(const TileGrid& grid, int64_t entries);
struct SortByTile {
    TileGrid grid;
    int64_t entries;          // or the capacity that emit filled
    void *tiles, *tiles_too;  // [entries] the second are for what lies between, as are those of ids
    uint32_t *ids, *ids_too;  // [entries]
    uint32_t* ranges;         // [tiles, 2] begin, end; zero on entry
    void* workspace;
    size_t workspace_bytes;
};
bool sort_by_tile(const SortByTile& args, Stream stream);  // are the sorted ids in ids_too?

// What blend_forward leaves for blend_backward, in one piece of memory: see blend.h.
constexpr int kSegment = 256;  // entries of a tile that a block of blend_backward walks
constexpr int kStrips = 8;     // of 8x4 pixels: a tile
struct Trace {
    uint32_t* taken;          // [entries / 32 + tiles, kStrips]
    uint32_t* walked;         // [tiles, kStrips]
    void* passed;             // [entries / kSegment + 1, kStrips, 32] float4; or [segments, kStrips, 32], see `first`
    uint32_t* segments;       // [max_segments, 2]
    uint32_t* stop;           // [H, W] a pixel took entries of its tile's list before this one
    float* left;              // [H, W] transmittance in the end: 1 - alpha, not rounded
    float* passed_inv_depth;  // [entries / kSegment + 1, kStrips, 32] or null, where nobody wants its gradient
    uint32_t* first;          // [tiles] or null: where a tile's segments begin among all that are walked
};
inline int64_t max_segments(const TileGrid& grid, int64_t entries) { return entries / kSegment + grid.tiles(); }
size_t trace_bytes(const TileGrid& grid, int64_t entries, bool inv_depth);
Trace trace_in(void* memory, const TileGrid& grid, int64_t entries, bool inv_depth);  // memory: 16-byte aligned
// The same in less memory, as lists are walked to their ends by few pixels. Of a first call of blend_forward, without room
// for what pixels have seen; totals->segments then tells how much a second one needs, which leaves only that.
size_t walk_bytes(const TileGrid& grid, int64_t entries);
Trace walk_in(void* memory, const TileGrid& grid, int64_t entries);
size_t passed_bytes(int64_t segments);

// Where sums are to be made in a fixed order: a splat's entries, numbered one after the other as emit wrote them.
struct Ordered {
    const uint32_t* pairs;        // [entries] the number of each entry of a tile's list; null: in any order
    const uint32_t* offsets;      // [N] by rank in depth order: a splat's first number
    const uint32_t* depth_order;  // [N]
    float* records;               // of every entry, zero on entry
    int64_t count;                // N
};

struct BlendForward {
    TileGrid grid;
    const Splat* splats;      // [N]
    const uint32_t* ids;      // [entries]
    const uint32_t* ranges;   // [tiles, 2]
    const float* background;  // [3]
    float* color;             // [3, H, W]
    float* alpha;             // [H, W] or null, likewise
    float* inv_depth;         // [H, W]
    Trace trace;              // nulls where no backward will follow
    Totals* totals;           // segments: += those of the trace
    float* left;              // [H, W] or null: the light that passes all splats
};
void blend_forward(const BlendForward& args, Stream stream);

struct BlendBackward {
    TileGrid grid;
    const Splat* splats;     // [N]
    const uint32_t* ids;     // [entries]
    const uint32_t* ranges;  // [tiles, 2]
    int64_t entries;         // or the capacity for them
    Trace trace;             // as blend_forward left it, likewise:
    const Totals* totals;
    const float* background;   // [3]
    const float* color;        // [3, H, W]
    const float* inv_depth;    // [H, W]  only with g_inv_depth
    const float* g_color;      // [3, H, W]
    const float* g_alpha;      // [H, W] or null
    const float* g_inv_depth;  // [H, W] or null
    bool absolute;             // fill kAbsX, kAbsY too
    float* grads;              // [N, kGradSize], zero on entry
    Ordered ordered;           // records [entries, kRecords, kGradSize]
};
constexpr int kRecords = 4;  // sums that a tile makes of a splat: one for each square of 8x8 pixels
void blend_backward(const BlendBackward& args, Stream stream);

// Stops the GPU, as PyTorch's own indexing does, if what blend_backward is about to read leads out of its memory: somebody
// else kept it meanwhile. `count` splats; everything has the right size.
void check_kept(const BlendBackward& args, int64_t count, Stream stream);
void check_lists(const BlendBackward& args, int64_t count, Stream stream);  // ids and ranges alone

// Of one view: g_background[block, c] = sum over some of the pixels of the final transmittance times g_color[c].
int64_t background_grad_blocks(const TileGrid& grid);
void background_grad(const TileGrid& grid, const float* left, const float* g_color, float* g_background, Stream stream);

struct PreprocessBackward {
    Gaussians<float> gaussians;
    View<float> view;
    const int32_t* radii;      // [views, N]
    const Splat* splats;       // [views, N]
    const float* grads;        // [views, N, kGradSize]
    GaussianGrads<float> out;  // rows of culled Gaussians are written, with zeros; `background` is not touched;
    int views;                 // of `view`, as preprocess has them: their gradients are added up, the last one's first
};  // world_to_camera [views, preprocess_backward_blocks(N), 16]: to be added up over blocks
int64_t preprocess_backward_blocks(int64_t count);
void preprocess_backward(const PreprocessBackward& args, Stream stream);

void mark_visible(int64_t count, const float* means, const float* world_to_camera, float near_depth, bool* visible,
                  Stream stream);

// ---- the stages one by one: stage_project.cu, blend_features.cu, scores.cu ------------------------------------------

void stage_project(const Gaussians<float>& gaussians, const View<float>& view, const Optics<float>& optics,
                   const OnScreen<float>& out, Stream stream);

struct StageProjectBackward {
    Gaussians<float> gaussians;
    View<float> view;
    Optics<float> optics;
    const int32_t* radii;        // [N]
    OnScreenGrads<float> grads;  // read
    GaussianGrads<float> out;    // world_to_camera [stage_project_backward_blocks(N), 16]: to be added up
};
int64_t stage_project_backward_blocks(int64_t count);
void stage_project_backward(const StageProjectBackward& args, Stream stream);

// What preprocess leaves, but for radii, from Gaussians on the screen. `everywhere`: no tile of a splat's rectangle is
// left out, and no pixel, since pixels look at points beside their centers.
void pack(int64_t count, const OnScreen<float>& screen, const TileGrid& grid, bool everywhere, const Screen& out,
          Stream stream);

// The splats alone, all of them, and totals for lists with that many entries.
struct PackAgain {
    int64_t count;
    OnScreen<float> screen;
    bool everywhere;
    const float* colors;    // [N, 3] or null: zeros
    int64_t entries;        // or the capacity for them
    const Totals* counted;  // as the lists were made
    Splat* splats;          // [N]
    Totals* totals;         // [1]
};
void pack_again(const PackAgain& args, Stream stream);

// Channels are taken by up to 16; a row of features is padded with zeros to whole portions.
inline int feature_quads(int channels) { return channels <= 4 ? 1 : channels <= 8 ? 2 : 4; }
inline int feature_stride(int channels) {
    const int portion = 4 * feature_quads(channels);
    return (channels + portion - 1) / portion * portion;
}

struct FeatureTrace {
    Trace common;         // its `passed` is not used:
    float* passed_light;  // [passed_count] transmittance
    void* passed;         // [stride / 4, passed_count] float4
    int64_t passed_count;
};
size_t feature_trace_bytes(const TileGrid& grid, int64_t entries, int stride);
FeatureTrace feature_trace_in(void* memory, const TileGrid& grid, int64_t entries, int stride);

struct BlendFeatures {
    TileGrid grid;
    const Splat* splats;     // [N]
    const uint32_t* ids;     // [entries]
    const uint32_t* ranges;  // [tiles, 2]
    int64_t entries;
    const float* features;  // [N, stride]
    int channels, stride;
    const float* offset;  // [2, H, W] or null
    float* image;         // [channels, H, W]
    float* left;          // [H, W] transmittance in the end
    FeatureTrace trace;   // nulls where no backward will follow
    Totals* totals;
};
void blend_features(const BlendFeatures& args, Stream stream);

constexpr int kMomentCount = 8;
struct BlendFeaturesBackward {
    BlendFeatures forward;
    const float* g_image;  // [channels, H, W] or null
    const float* g_left;   // [H, W] or null
    int64_t count;         // N
    OnScreen<float> screen;
    float* moments;            // [N, kMomentCount] zero on entry
    float* g_features;         // [N, stride] zero on entry
    OnScreenGrads<float> out;  // written; `absolute` may be null
    Ordered ordered;           // records [entries, kRecords, feature_record], of one portion of channels at a time
    int portion;               // the first that is walked
};
inline int feature_record(int channels, bool absolute) { return 6 + 4 * feature_quads(channels) + (absolute ? 2 : 0); }
void blend_features_backward(const BlendFeaturesBackward& args, Stream stream);

// The same from what blend_backward leaves of three channels.
void screen_grads(int64_t count, const OnScreen<float>& screen, const float* grads, float* g_features,
                  const OnScreenGrads<float>& out, Stream stream);

// Slots of `sums` as in cpu/scores.h.
constexpr int kScoreSize = 8;
struct Scores {
    TileGrid grid;
    const Splat* splats;           // [N]
    const uint32_t* ids;           // [entries]
    const uint32_t* ranges;        // [tiles, 2]
    const float* offset;           // [2, H, W] or null
    const float* weights;          // [H, W] or null: 1
    const float* colors;           // [N, 3], or null: no moments
    const float* gradient;         // [3, H, W] or null
    const float *picture, *along;  // [H, W] sum of all channels; product of picture and gradient
    float* sums;                   // [N, kScoreSize] zero on entry
    int32_t *largest, *median;     // [H, W]
    const Totals* totals;
    Ordered ordered;  // records [entries, kStrips, kScoreSize]
};
void scores(const Scores& args, Stream stream);

// ---- losses: images as planes, `planes` of [height, width] ---------------------------------------------------------

struct Ssim {
    int planes, height, width;
    int crop;                // windows this close to the border do not count: 0 ("same") or 5 ("valid")
    const float* a;          // [planes, height, width]
    const float* b_float;    // the same, or null:
    const uint8_t* b_bytes;  // 0..255
    const float* mask;       // [height, width] or null; multiplies a and b
    bool clamped;            // a is taken to [0, 1] first
    float* maps;             // [3, planes, height, width] for the gradient, or null
    float* partial_ssim;     // [ssim_blocks] sums of a block
    float* partial_l1;       // [ssim_blocks] or null
};
int64_t ssim_blocks(int planes, int height, int width);
void ssim_forward(const Ssim& args, Stream stream);
// The sums of the blocks, added up, over `count`.
void ssim_value(const float* partial, int64_t blocks, double count, float* value, Stream stream);
void photometric_value(const float* partial_ssim, const float* partial_l1, int64_t blocks, double count, float lambda,
                       float* loss, float* l1, Stream stream);

struct SsimBackward {
    Ssim forward;           // maps filled by ssim_forward
    const float* upstream;  // [1] gradient of the mean, or null for 1
    float ssim_weight;      // factor of the mean SSIM
    float l1_weight;        // factor of the mean absolute difference
    double count;           // of values that are averaged
    float* g_a;             // [planes, height, width]
};
void ssim_backward(const SsimBackward& args, Stream stream);

// ---- Adam ----------------------------------------------------------------------------------------------------------

constexpr int kMaxAdamTensors = 16;
struct AdamTensor {
    float* param;
    const float* grad;
    float* exp_avg;
    float* exp_avg_sq;
    int64_t size;
    int64_t row;      // values per Gaussian, to look up `visible`
    float step_size;  // lr / (1 - beta1^t)
};
struct AdamRates {
    float beta2, eps;
    float rest1, rest2;    // 1 - beta1, 1 - beta2: rounded from double, since 1 - 0.999f is off by 1e-5
    float inv_sqrt_bias2;  // 1 / sqrt(1 - beta2^t)
};
struct Adam {
    AdamTensor tensors[kMaxAdamTensors];
    int count;
    AdamRates rates;
    const bool* visible;  // [N] or null
};
void adam(const Adam& args, Stream stream);

// ---- preprocess_backward and Adam as one stage ---------------------------------------------------------------------

struct Trained {  // aligned to 16 bytes
    float* param;
    float* exp_avg;
    float* exp_avg_sq;
    float step_size;  // lr / (1 - beta1^t)
};
// A row out of view has no gradient, and what Adam does to it depends on nothing but its moments: these decay, and the
// parameters drift, by m / sqrt(v) times a number that is the same for all rows that moved last in the same step. So such
// rows may wait, and catch up all the steps they missed before a view can show them.
constexpr int kWindow = 128;  // steps that a row may miss
struct alignas(16) Missed {   // since a certain step
    float drift[6];           // of means, sh_dc, sh_rest, opacities, scales, quats
    float decay1, decay2;     // beta1, beta2 to the power of the number of steps
};
struct Waiting {
    int32_t* moved_at;  // [N] the step that each row is up to date with; null: all rows move in every step
    Missed* missed;     // [kWindow] since this step, modulo kWindow
};
constexpr int kMaxCameras = 32;  // of a step, one for each process
struct CatchUp {
    int64_t count;
    int rest_count;
    Trained means, sh_dc, sh_rest, opacities, scales, quats;  // colors may be elsewhere: null
    float eps;  // times sqrt(1 - beta2^step): as good as exact where sqrt(v) is far from it
    Waiting waiting;
    int step;  // that the rows will be up to date with
    bool all;  // or only those that one of the views can show
    View<float> views[kMaxCameras];
    int cameras;
    bool* may_show;  // [N] or null: which rows the views can show, whether they waited or not
};
void catch_up(const CatchUp& args, Stream stream);

struct LossSums {            // as ssim_forward left them
    const float *ssim, *l1;  // [blocks]
    int64_t blocks;
    double count;  // of values that are averaged
    float lambda;  // the loss is (1 - lambda) L1 + lambda (1 - SSIM)
};
struct PreprocessBackwardAdam {
    Gaussians<float> gaussians;  // raw, with spherical harmonics; the same memory as the params below
    View<float> view;
    const int32_t* radii;  // [N]
    const Splat* splats;   // [N]
    const float* grads;    // [N, kGradSize]
    Trained means, sh_dc, sh_rest, opacities, scales, quats;
    AdamRates rates;
    float beta1;
    Waiting waiting;
    int step;
    float* grad_norm_sum;  // [N] or null, likewise the next two: see GaussianGrads
    float* visits;
    float* abs_grad_norm_sum;
    const Totals* totals;  // of preprocess. If it counted more entries
    int64_t capacity;      // than this, the gradients are wrong: nothing moves, and losses[3] += 1.
    LossSums loss;
    float* losses;  // [4] += loss, L1, 1, 0
};
constexpr int kMaxRestCount = 15;
void preprocess_backward_adam(const PreprocessBackwardAdam& args, Stream stream);

// ---- Gaussians that several processes hold, each some of the rows ------------------------------------------------------
//
// A process projects its Gaussians for the cameras of all of them. append makes records of what a camera sees, which go to
// the process of that camera; unpack orders those that have come from all. Gradients of splats go back the same way.
// A record is a Splat, with the depth in the place of inv_depth; and a TileSet, with the row, counted over all processes, in
// the place of count. A large one's count is in its mask.

// Of a Gaussian that a camera shows: the number of its record, and which channels are not dark, a bit for each. Else -1.
constexpr int kChannelBits = 3;

// A splat on its way to the process that blends it. In the splat, inv_depth is the bits of the depth key. In the tiles,
// count is the row of all, and where there are too many tiles for a mask, mask is their count.
struct Record {
    Splat splat;
    TileSet tiles;
};

struct Append {
    int64_t count;         // N Gaussians here
    Screen screen;         // as preprocess left it for this camera,
    const Totals* totals;  // and in totals[camera] how much; before it are those of earlier cameras
    int camera;
    int rank, ranks;      // row i here is row i ranks + rank
    int64_t capacity;     // records beyond it are dropped: totals tell
    Record* records;      // [capacity] of all cameras, one after the other, in the order of rows
    int32_t* slots;       // [N]
    uint64_t* published;  // [emit_blocks(N)] zero on entry
};
void append(const Append& args, Stream stream);

struct Unpack {
    int64_t count;  // M records
    int blocks;     // of the processes that they are from, each in the order of rows
    int64_t begin[kMaxCameras + 1];
    const Record* records;  // [M]
    Screen out;             // but for radii; keys and indices in the order of all rows
};
void unpack(const Unpack& args, Stream stream);

// preprocess_backward_adam along the mean gradient of several cameras, which others have blended.
struct DealtBackwardAdam {
    Gaussians<float> gaussians;
    View<float> views[kMaxCameras];
    int cameras;
    const int32_t* slots;            // [cameras, N] as append left them
    const float* grads;              // [records, kGradSize]
    float opacity_pull, scale_pull;  // gradients of each opacity and scale besides: those of regularizers
    Trained means, sh_dc, sh_rest, opacities, scales, quats;
    AdamRates rates;
    float beta1;
    Waiting waiting;
    int step;
    float* grad_norm_sum;  // [N] or null, likewise the next two
    float* visits;
    float* abs_grad_norm_sum;
};
void dealt_backward_adam(const DealtBackwardAdam& args, Stream stream);

// ---- colors on the host ----------------------------------------------------------------------------------------------

// Rows of a table in the host's memory, [., 3 width]: the color's coefficients of a Gaussian, first those of sh_dc, then
// Adam's first moments of them, then the second.
constexpr int kMaxWidth = 48;
struct ColorRows {
    int64_t count;  // V
    int width;
    float* table;
    const int64_t* rows;  // [V]
    float* values[6];  // of these rows: sh_dc [V, 3], sh_rest [V, width - 3], then their moments; null without sh_rest
};
// What a row has missed since the step first + i: sums[i] of drifts of sh_dc and of sh_rest, and decays[now] - decays[i], the
// logarithms of how far the moments have decayed.
struct FetchRows {
    ColorRows colors;
    const int32_t* moved_at;  // of all rows of the table: the step that they are up to date with
    int first, now;           // now: in the tables below
    const double2 *sums, *decays;
    float eps;
    int just_moved;  // 1: only rows that are up to date, 0: only others, -1: all
};
void fetch_rows(const FetchRows& args, Stream stream);
void store_rows(const ColorRows& args, const bool* wanted, Stream stream);  // wanted [V]

// ---- nearest neighbors ---------------------------------------------------------------------------------------------

size_t knn_workspace(int64_t count);
void knn_mean_dist2(int64_t count, const float* points, float* mean_dist2, void* workspace, size_t workspace_bytes,
                    Stream stream);

}  // namespace gs::cuda
