"""Drop-in name for the original's simple-knn: `from simple_knn._C import distCUDA2`."""
