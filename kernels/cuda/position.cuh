// Sine and cosine of angles up to 100 000, to 2 units in the last place. CUDA's own have a way for all angles, and keep local
// memory for it.
#pragma once
#include "common.cuh"

__device__ __forceinline__ void sine_cosine(float angle, float& sine, float& cosine) {
    // π/2 in three parts (Cody and Waite 1980).
    float quarters = rintf(angle * 0.63661977f);
    float x = fmaf(quarters, -1.57079637f, angle);
    x = fmaf(quarters, 4.37113900e-8f, x);
    x = fmaf(quarters, 1.71512451e-15f, x);
    // Polynomials for -π/4 ... π/4 (Moshier, Cephes).
    float square = x * x;
    float s = fmaf(fmaf(fmaf(-1.9515296e-4f, square, 8.3321609e-3f), square, -1.6666655e-1f), square * x, x);
    float c = fmaf(fmaf(fmaf(2.4433157e-5f, square, -1.3887316e-3f), square, 4.1666646e-2f), square * square,
                   fmaf(-0.5f, square, 1.0f));
    int quarter = (int)quarters & 3;
    sine = quarter & 1 ? c : s;
    cosine = quarter & 1 ? s : c;
    if (quarter & 2) sine = -sine;
    if ((quarter + 1) & 2) cosine = -cosine;
}
