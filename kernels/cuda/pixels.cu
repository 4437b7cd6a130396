// Camera pixels to the vision tower's patches: format, cut, grey, antialiased bicubic scaling, normalisation. All architectures;
// bound by integer arithmetic where pictures shrink, by memory where they do not.
//
// The arithmetic is that of src/pixels, to the bit: 8-bit values between the two passes, sums in 22-bit fixed point. A block makes
// 16 × 16 pixels. It does the first pass of some lines at a time into shared memory, and adds them to the sums of the second:
// lines of any number fit, and those that two blocks need are made twice.
#include "common.cuh"

#define TILE 16
#define LINES 32
#define PRECISION 22

enum { RGB, RGBA, NV12 };

struct Camera {
    const uint8_t* data;    // rows `top ..` of brightness, or of RGB
    const uint8_t* colour;  // rows `colour_top ..` of NV12's
    int format, width, height, top, pitch, colour_top, colour_pitch;
    int x, y;     // of the cut
    int outside;  // what there is beyond the picture; -1 for its edge
    int grey, left;
    int luma, red, blue, green_of_blue, green_of_red;
};

// src/pixels/resample.rs's: position i is the sum of weights[i · taps ..] and the `count` inputs from `first` on.
struct Axis {
    const int *first, *count, *weights;
    int taps, size;
};

__device__ __forceinline__ int byte_of(int value) { return min(max(value, 0), 255); }

__device__ __forceinline__ uint32_t packed(int red, int green, int blue) { return red | green << 8 | blue << 16; }

// A byte less 128, twice in the two bytes of a number.
__device__ __forceinline__ int wide(int byte) { return (byte - 128) * 256 + (byte ^ 128); }

__device__ __forceinline__ int part(int value, int gain) { return (value * gain) >> 16; }

// NV12 to RGB as src/pixels/yuv.rs has it: colours along the row, then between rows, then the products.
__device__ __forceinline__ uint32_t nv12_at(const Camera& camera, int x, int y) {
    int last_column = camera.width / 2 - 1, last_row = camera.height / 2 - 1;
    int column = x / 2, row = y / 2;
    int beside = x % 2 ? min(column + 1, last_column) : max(column - 1, 0);
    int above = y % 2 ? min(row + 1, last_row) : max(row - 1, 0);
    int share = camera.left ? (x % 2 ? 2 : 4) : 3;  // quarters of the own column
    int sums[2];
    for (int k = 0; k < 2; k++) {
        int along[2];
        for (int line = 0; line < 2; line++) {
            const uint8_t* from = camera.colour + (size_t)((line ? above : row) - camera.colour_top) * camera.colour_pitch;
            along[line] = (share * from[2 * column + k] + (4 - share) * from[2 * beside + k] + 2) >> 2;
        }
        sums[k] = wide((3 * along[0] + along[1] + 2) >> 2);
    }
    int luma = part(wide(camera.data[(size_t)(y - camera.top) * camera.pitch + x]), camera.luma) + 128;
    return packed(byte_of(luma + part(sums[1], camera.red)),
                  byte_of(luma + part(sums[0], camera.green_of_blue) + part(sums[1], camera.green_of_red)),
                  byte_of(luma + part(sums[0], camera.blue)));
}

// Pixel (x, y) of the cut.
__device__ __forceinline__ uint32_t pixel_at(const Camera& camera, int x, int y) {
    x += camera.x;
    y += camera.y;
    bool inside = x >= 0 && x < camera.width && y >= 0 && y < camera.height;
    if (!inside && camera.outside >= 0) return packed(camera.outside, camera.outside, camera.outside);
    x = min(max(x, 0), camera.width - 1);
    y = min(max(y, 0), camera.height - 1);
    uint32_t pixel;
    if (camera.format == NV12) {
        pixel = nv12_at(camera, x, y);
    } else {
        size_t at = (size_t)(y - camera.top) * camera.pitch + (camera.format == RGBA ? 4 : 3) * x;
        pixel = packed(camera.data[at], camera.data[at + 1], camera.data[at + 2]);
    }
    if (!camera.grey) return pixel;
    uint32_t red = pixel & 255, green = pixel >> 8 & 255, blue = pixel >> 16;
    uint32_t luma = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16;
    return packed(luma, luma, luma);
}

struct Sums {
    int red, green, blue;
};

__device__ __forceinline__ void add(Sums& sums, int weight, uint32_t pixel) {
    sums.red += weight * (int)(pixel & 255);
    sums.green += weight * (int)(pixel >> 8 & 255);
    sums.blue += weight * (int)(pixel >> 16);
}

__device__ __forceinline__ uint32_t rounded(const Sums& sums) {
    return packed(byte_of(sums.red >> PRECISION), byte_of(sums.green >> PRECISION), byte_of(sums.blue >> PRECISION));
}

__device__ __forceinline__ float normalised(uint32_t byte) { return ((float)byte / 255.0f - 0.5f) / 0.5f; }

// A picture [side, side] of a camera's: patches [patches, 3, patch, patch] from -1 to 1, or for a patch of zero bytes [side, side, 3].
// `one` is the axis of the first pass: columns where `rows_first`, else rows.
extern "C" __global__ void __launch_bounds__(256, 4)
    picture_patches(Camera camera, Axis one, Axis two, int rows_first, int patch, float* patches, uint8_t* bytes) {
    __shared__ uint32_t between[LINES][TILE];
    const Sums half = {1 << (PRECISION - 1), 1 << (PRECISION - 1), 1 << (PRECISION - 1)};
    const int side = one.size;
    // Neighbours are neighbours of the first axis; positions beyond the picture do the last one's work again.
    const int i = threadIdx.x % TILE, j = threadIdx.x / TILE;
    const int own_one = (int)blockIdx.x * TILE + i, own_two = (int)blockIdx.y * TILE + j;
    const int at_one = min(own_one, side - 1), at_two = min(own_two, side - 1);
    const int first_two = two.first[at_two], end_two = first_two + two.count[at_two];
    const int* weights_two = two.weights + (size_t)at_two * two.taps;
    const int first_one = one.first[at_one], count_one = one.count[at_one];
    const int* weights_one = one.weights + (size_t)at_one * one.taps;
    const int last = min((int)blockIdx.y * TILE + TILE, side) - 1;
    const int begin = two.first[blockIdx.y * TILE], end = two.first[last] + two.count[last];
    Sums sums = half;
    for (int lines = begin; lines < end; lines += LINES) {
        for (int line = j; line < min(LINES, end - lines); line += TILE) {
            Sums along = half;
            for (int tap = 0; tap < count_one; tap++) {
                int x = first_one + tap, y = lines + line;
                add(along, weights_one[tap], rows_first ? pixel_at(camera, x, y) : pixel_at(camera, y, x));
            }
            between[line][i] = rounded(along);
        }
        __syncthreads();
        for (int at = max(first_two, lines); at < min(end_two, lines + LINES); at++)
            add(sums, weights_two[at - first_two], between[at - lines][i]);
        __syncthreads();
    }
    if (own_one >= side || own_two >= side) return;
    const uint32_t pixel = rounded(sums);
    const int x = rows_first ? own_one : own_two, y = rows_first ? own_two : own_one;
    if (patch == 0) {
        uint8_t* to = bytes + ((size_t)y * side + x) * 3;
        for (int c = 0; c < 3; c++) to[c] = (uint8_t)(pixel >> 8 * c);
        return;
    }
    const int across = side / patch, row = y / patch, column = x / patch;
    if (row >= across || column >= across) return;
    const size_t area = (size_t)patch * patch;
    float* to = patches + ((size_t)row * across + column) * 3 * area + (y - row * patch) * patch + x - column * patch;
    for (int c = 0; c < 3; c++) to[c * area] = normalised(pixel >> 8 * c & 255);
}
EXPORT(picture_patches)
