"""Drop-in name for fused-ssim."""
