// constants.h: every threshold of the method, named and explained once. reference.py has its own copies.
#pragma once

namespace gs {

constexpr int kTileSize = 16;               // pixels; splats are sorted per tile of 16x16
constexpr double kNearDepth = 0.2;          // splats this close to the camera plane, or behind it, are skipped
constexpr double kBlur = 0.3;               // px^2 added to the projected covariance: no splat thinner than a pixel
constexpr double kFovMargin = 1.3;          // the projection is linearized at most this far outside the image
constexpr double kAntialiasFloor = 2.5e-5;  // lower bound of det(cov) / det(cov + blur)
constexpr double kMipFloor = 1e-6;          // Mip-Splatting's lower bound of determinants
constexpr double kMaxAngle = 3.1;           // radians off the axis: a fisheye sees nothing right behind it
constexpr double kExtentSigmas = 3.0;       // a splat's square of tiles reaches this many standard deviations
constexpr double kDiscriminantFloor = 0.1;  // keeps the eigenvalues of round splats apart
constexpr double kAlphaMin = 1.0 / 255.0;   // fainter contributions are skipped: invisible in 8 bits
constexpr double kAlphaMax = 0.99;          // keeps 1 - alpha away from 0 in the backward recursion
constexpr double kStopAt = 1e-4;            // a pixel is done when less light than this would still pass

}  // namespace gs
