// tiles.h: which tiles a splat belongs to.
//
// The set is the published one, the rectangle of tiles around the 3-sigma square, minus the tiles in which
// no pixel can reach alpha 1/255. Leaving those out changes no pixel and most of the work.
#pragma once
#include "constants.h"
#include "types.h"

namespace gs {

template <typename Int> struct Rect { Int x0, y0, x1, y1; };  // half open
using TileRect = Rect<int>;

template <typename Int>
GS_HD auto empty(Rect<Int> r) {
    return (r.x1 <= r.x0) | (r.y1 <= r.y0);
}

// Counted from the pixel's corner, not its center: hence the half. Not finite gives an empty rectangle.
template <typename T>
GS_HD auto tile_rect(Vec2<T> mean, T radius, int tiles_x, int tiles_y) {
    const T size = T(kTileSize), x = mean.x - T(0.5), y = mean.y - T(0.5), one = T(1);
    const auto tile = [size](T at, int tiles) { return to_int(clamp(at / size, T(0), T(tiles))); };
    return Rect<decltype(to_int(x))>{tile(x - radius, tiles_x), tile(y - radius, tiles_y),
                                     tile(x + radius + size - one, tiles_x), tile(y + radius + size - one, tiles_y)};
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

}  // namespace gs
