// tiles.h: which tiles a splat belongs to. Used when counting and when filling, so the two always agree.
//
// The set is the published one, the rectangle of tiles around the 3-sigma square, minus the tiles in which
// no pixel can reach alpha 1/255. Leaving those out changes no pixel and most of the work.
#pragma once
#include "constants.h"
#include "falloff.h"
#include "types.h"

namespace gs {

struct TileRect { int x0, y0, x1, y1; };  // half open

GS_HD bool empty(TileRect r) { return r.x1 <= r.x0 || r.y1 <= r.y0; }

// Counted from the pixel's corner, not its center: hence the half. Not finite gives an empty rectangle.
template <typename T>
GS_HD TileRect tile_rect(Vec2<T> mean, T radius, int tiles_x, int tiles_y) {
    const T size = T(kTileSize), x = mean.x - T(0.5), y = mean.y - T(0.5), zero = T(0);
    return {int(clamp((x - radius) / size, zero, T(tiles_x))), int(clamp((y - radius) / size, zero, T(tiles_y))),
            int(clamp((x + radius + size - T(1)) / size, zero, T(tiles_x))),
            int(clamp((y + radius + size - T(1)) / size, zero, T(tiles_y)))};
}

template <typename T>
struct Box {
    T x0, y0, x1, y1;
};  // closed; from pixel center to pixel center

// The pixel centers of a tile that lie in the image.
template <typename T>
GS_HD Box<T> tile_box(int tile_x, int tile_y, int width, int height) {
    const int x0 = tile_x * kTileSize, y0 = tile_y * kTileSize;
    const int x1 = x0 + kTileSize < width ? x0 + kTileSize : width,
              y1 = y0 + kTileSize < height ? y0 + kTileSize : height;
    return {T(x0) + T(0.5), T(y0) + T(0.5), T(x1) - T(0.5), T(y1) - T(0.5)};
}

// How much falloff a splat survives: alpha >= 1/255 where sigma <= reach. Negative: nowhere.
template <typename T>
GS_HD T falloff_reach(T opacity) {
    return log(opacity * T(1.0 / kAlphaMin));
}

// Can the splat reach alpha 1/255 anywhere in the box? The least sigma in a box that does not hold the mean
// lies on an edge that faces it; along such an edge sigma is a parabola. Rounding errs towards yes.
template <typename T>
GS_HD auto reaches(Vec2<T> mean, Sym2<T> q, T reach, Box<T> box) {
    const T dx0 = box.x0 - mean.x, dx1 = box.x1 - mean.x, dy0 = box.y0 - mean.y, dy1 = box.y1 - mean.y, zero = T(0);
    const T ex = clamp(zero, dx0, dx1), ey = clamp(zero, dy0, dy1);  // the facing edges; 0 where the mean is between
    const T on_x = clamp(-q.xy * ex / q.yy, dy0, dy1);               // best y along x = ex
    const T on_y = clamp(-q.xy * ey / q.xx, dx0, dx1);
    const T a = falloff(Vec2<T>{ex, on_x}, q) - T(2e-6) * (q.xx * ex * ex + q.yy * on_x * on_x);
    const T b = falloff(Vec2<T>{on_y, ey}, q) - T(2e-6) * (q.xx * on_y * on_y + q.yy * ey * ey);
    return min(a, b) <= reach + T(1e-3);
}

}  // namespace gs
