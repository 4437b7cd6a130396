// Convolutions and resizing over channels-last volumes: a thread for each output. All architectures; bound by memory.
#include "common.cuh"

struct Unfold {
    int size[3], kernel[3], stride[3], pad_before[3], output[3];
    int channels;
};

// Columns of a convolution: x [t, h, w, channels] → out [t', h', w', channels, kt, kh, kw]; zeros around x
extern "C" __global__ void __launch_bounds__(256) unfold(const float* x, Unfold shape, size_t len, float* out) {
    size_t i = global_index();
    if (i >= len) return;
    size_t left = i;
    int element[3], position[3];
    for (int axis = 2; axis >= 0; axis--) {
        element[axis] = (int)(left % shape.kernel[axis]);
        left /= shape.kernel[axis];
    }
    int channel = (int)(left % shape.channels);
    left /= shape.channels;
    size_t at = 0;
    bool inside = true;
    for (int axis = 2; axis >= 0; axis--) {
        position[axis] = (int)(left % shape.output[axis]);
        left /= shape.output[axis];
    }
    for (int axis = 0; axis < 3; axis++) {
        int from = position[axis] * shape.stride[axis] + element[axis] - shape.pad_before[axis];
        inside = inside && from >= 0 && from < shape.size[axis];
        at = at * shape.size[axis] + from;
    }
    out[i] = inside ? x[at * shape.channels + channel] : 0.0f;
}
EXPORT(unfold)

// Depthwise 3×3, stride 1, one zero around: x and out [frames, height, width, channels], weight [channels, 1, 3, 3],
// bias [channels] or none
extern "C" __global__ void __launch_bounds__(256)
    depthwise3x3(const float* x, size_t len, int height, int width, int channels, Weight weight, Weight bias, float* out) {
    size_t i = global_index();
    if (i >= len) return;
    int channel = (int)(i % channels), column = (int)(i / channels % width), row = (int)(i / channels / width % height);
    float sum = bias.data ? flat_at(bias, channel) : 0.0f;
    for (int tap = 0; tap < 9; tap++) {
        int down = tap / 3 - 1, right = tap % 3 - 1;
        if (row + down < 0 || row + down >= height || column + right < 0 || column + right >= width) continue;
        long long apart = ((long long)down * width + right) * channels;
        sum += x[(long long)i + apart] * weight_at(weight, channel, tap);
    }
    out[i] = sum;
}
EXPORT(depthwise3x3)

// Where torch's bilinear interpolation (align_corners=False) takes output `i` of `to` from: between first and second, `part`
// of the second.
__device__ __forceinline__ void source(int i, int from, int to, int& first, int& second, float& part) {
    float position = fmaxf((float)from / (float)to * ((float)i + 0.5f) - 0.5f, 0.0f);
    first = min((int)position, from - 1);
    second = min(first + 1, from - 1);
    part = position - (float)first;
}

// x [frames, height, width, channels] → out [frames, to_height, to_width, channels]
extern "C" __global__ void __launch_bounds__(256) bilinear(const float* x, size_t len, int height, int width, int to_height,
                                                           int to_width, int channels, float* out) {
    size_t i = global_index();
    if (i >= len) return;
    int channel = (int)(i % channels), column = (int)(i / channels % to_width);
    int row = (int)(i / channels / to_width % to_height);
    const float* frame = x + i / channels / to_width / to_height * height * width * channels + channel;
    int top, bottom, left, right;
    float down, across;
    source(row, height, to_height, top, bottom, down);
    source(column, width, to_width, left, right, across);
    float upper = frame[((size_t)top * width + left) * channels] * (1.0f - across) +
                  frame[((size_t)top * width + right) * channels] * across;
    float lower = frame[((size_t)bottom * width + left) * channels] * (1.0f - across) +
                  frame[((size_t)bottom * width + right) * channels] * across;
    out[i] = upper * (1.0f - down) + lower * down;
}
EXPORT(bilinear)
