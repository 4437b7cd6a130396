// Choosing a token where the logits are, so that one id is read back in place of all of them. All architectures; bound by memory.
//
// choose_most finds the greatest logit and whatever is no number; of a greedy choice that is all. To draw one, choose_any or
// choose_nucleus comes behind it. What is chosen is defined in src/choice.rs.
//
// Weights, exp((logit - greatest) / temperature), become integers of up to 62 bits: their sums do not depend on the order in
// which threads come, so that equal logits and points give equal tokens in every run and on every GPU. A weight is good to some
// 10⁻⁷ of itself. Different logits are in the order of the logits even where a temperature above some 10⁹ makes them as probable.
#include "common.cuh"

using Sum = unsigned long long;

constexpr int THREADS = 1024; // one block a multiprocessor will do: registers are worth more
constexpr int WARPS = THREADS / 32;
constexpr int EACH = 4; // candidates of a thread
// Candidates of a block; src/cuda/sample.rs has the same number.
constexpr int SHARE = EACH * THREADS;
constexpr unsigned EVERY_LANE = 0xffffffffu;
constexpr int DIGIT = 8; // bits that a pass over the nucleus decides
constexpr int BINS = 1 << DIGIT;
constexpr unsigned NOWHERE = 0xffffffffu;

// The tokens that may be chosen.
struct Candidates {
    const unsigned* words; // `count` ids, ascending, or a bit for each of `count` ids
    int count;
    int listed; // ids, not bits
};

struct Draw {
    Sum point, share;             // the point and top-p, as parts of 2⁶⁴
    float inverse, inverse_rest;  // 1 / temperature; the second is what the first lacks
    float reach;                  // a logit that is further below the greatest is in no nucleus
    float scale;                  // what a weight of one becomes
    int id_bits;                  // that an id takes
};

// All but the outcome is zero between choices.
struct State {
    Sum best, total;
    unsigned broken, listed, done, reserved;
    // What is read back: TOKEN, its id and logit; NOT_FINITE, the first id and its logit; or NOTHING.
    int outcome;
    unsigned id;
    float logit;
    unsigned reserved_too;
};

// The numbers are those of `outcome` in src/cuda/sample.rs.
enum Outcome : int { TOKEN = 0, NOT_FINITE = 1, NOTHING = 2 };

// Candidate number `i`: whether there is one, and its id.
__device__ __forceinline__ bool candidate(const Candidates& candidates, unsigned i, unsigned& id) {
    if (i >= (unsigned)candidates.count) return false;
    id = candidates.listed ? candidates.words[i] : i;
    return candidates.listed || (candidates.words[i / 32] >> (i % 32) & 1);
}

// A number in whose order that of floats is; zeros of both signs are one.
__device__ __forceinline__ unsigned ordered(float x) {
    unsigned bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float unordered(unsigned order) {
    return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

// The weight of a logit. The argument of the exponential is made of two floats, as one would be off by 10⁻⁶ at -16.
__device__ __forceinline__ Sum weight_of(float logit, float most, const Draw& draw) {
    float below = logit - most;
    float back = below - logit;
    float lost = (logit - (below - back)) - (most + back); // of the difference (Knuth's TwoSum)
    float x = below * draw.inverse;
    if (!(x > -60.0f)) return below == 0.0f ? (Sum)draw.scale : 0; // a tiny temperature makes no number of 0 · infinity
    float rest = fmaf(below, draw.inverse, -x) + (lost * draw.inverse + below * draw.inverse_rest);
    float weight = expf(x);
    return (Sum)(fmaf(weight, rest, weight) * draw.scale);
}

// Shared memory of a block that searches.
struct Search {
    Sum warps[WARPS];
    Sum bins[BINS];
    unsigned counts[BINS];
    unsigned at;
    Sum before, weight;
    Sum rank;
};

struct Found {
    unsigned at;        // number of the thread, or NOWHERE
    Sum before, weight; // what the threads before it add up to, and its own
    Sum total;          // of all threads
};

// Numbers of the block's threads laid one behind the other: whose covers `target`, counted from 1? Everyone gets the answer.
__device__ __forceinline__ Found find(Sum own, Sum target, Search& search) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Sum upto = own;
    for (int apart = 1; apart < 32; apart *= 2) {
        Sum other = __shfl_up_sync(EVERY_LANE, upto, apart);
        if (lane >= apart) upto += other;
    }
    if (lane == 31) search.warps[warp] = upto;
    if (threadIdx.x == 0) search.at = NOWHERE;
    __syncthreads();
    Sum total = 0, below = 0;
    for (int other = 0; other < WARPS; other++) {
        if (other < warp) below += search.warps[other];
        total += search.warps[other];
    }
    upto += below;
    if (upto - own < target && target <= upto) {
        search.at = threadIdx.x;
        search.before = upto - own;
        search.weight = own;
    }
    __syncthreads();
    Found found = {search.at, search.before, search.weight, total};
    __syncthreads();
    return found;
}

// The sum over the block, in every thread.
__device__ __forceinline__ Sum total_of(Sum own, Search& search) { return find(own, 0, search).total; }

// Whether all other blocks are done. The last one sees what they wrote.
__device__ __forceinline__ bool is_last(State* state) {
    __shared__ unsigned before;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) before = atomicAdd(&state->done, 1u);
    __syncthreads();
    __threadfence();
    return before == gridDim.x - 1;
}

// The candidate with the greatest logit, and the first logit of all that is no number. The grid covers the vocabulary.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    choose_most(const float* logits, int vocabulary, Candidates candidates, State* state) {
    __shared__ Sum bests[WARPS];
    __shared__ unsigned brokens[WARPS];
    int lane = threadIdx.x % 32;
    // The greatest in their order are the greatest logit, the lowest id, and the first that is no number.
    Sum best = 0;
    unsigned broken = 0;
    for (int k = 0; k < EACH; k++) {
        unsigned i = blockIdx.x * SHARE + k * THREADS + threadIdx.x, id;
        if (i < (unsigned)vocabulary && (__float_as_uint(logits[i]) & 0x7f800000u) == 0x7f800000u)
            broken = max(broken, ~i);
        if (candidate(candidates, i, id)) best = max(best, (Sum)ordered(logits[id]) << 32 | ~id);
    }
    for (int apart = 16; apart > 0; apart /= 2) {
        best = max(best, __shfl_xor_sync(EVERY_LANE, best, apart));
        broken = max(broken, __shfl_xor_sync(EVERY_LANE, broken, apart));
    }
    if (lane == 0) {
        bests[threadIdx.x / 32] = best;
        brokens[threadIdx.x / 32] = broken;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < WARPS; warp++) {
            best = max(best, bests[warp]);
            broken = max(broken, brokens[warp]);
        }
        if (best) atomicMax(&state->best, best);
        if (broken) atomicMax(&state->broken, broken);
    }
    if (!is_last(state) || threadIdx.x != 0) return;
    const volatile State* all = state;
    best = all->best;
    broken = all->broken;
    unsigned id = ~(broken ? broken : (unsigned)best);
    state->outcome = broken ? NOT_FINITE : best ? TOKEN : NOTHING;
    state->id = id;
    state->logit = broken || best ? logits[id] : 0.0f;
    state->best = 0;
    state->broken = 0;
    state->done = 0;
}
EXPORT(choose_most)

// The weights of this thread's share of block `block`, candidates that lie one behind the other.
__device__ __forceinline__ Sum weigh_share(const float* logits, const Candidates& candidates, const Draw& draw, float most,
                                           unsigned block, Sum (&weights)[EACH], unsigned (&ids)[EACH]) {
    Sum sum = 0;
    for (int k = 0; k < EACH; k++) {
        bool is = candidate(candidates, block * SHARE + threadIdx.x * EACH + k, ids[k]);
        weights[k] = is ? weight_of(logits[ids[k]], most, draw) : 0;
        sum += weights[k];
    }
    return sum;
}

// Behind choose_most, which found one: the candidate in whose weight the point lies, in the order of ids. The grid covers the
// candidates; sums [blocks].
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    choose_any(const float* logits, Candidates candidates, Draw draw, State* state, Sum* sums) {
    __shared__ Search search;
    if (state->outcome != TOKEN) return;
    float most = state->logit;
    Sum weights[EACH];
    unsigned ids[EACH];
    Sum sum = total_of(weigh_share(logits, candidates, draw, most, blockIdx.x, weights, ids), search);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
    if (!is_last(state)) return;
    const volatile Sum* all = sums;
    Sum own = 0;
    for (unsigned i = threadIdx.x; i < gridDim.x; i += THREADS) own += all[i];
    Sum target = __umul64hi(draw.point, total_of(own, search)) + 1;
    // The block in whose share it lies, and then the thread.
    unsigned block = 0;
    for (unsigned first = 0; first < gridDim.x; first += THREADS) {
        unsigned i = first + threadIdx.x;
        Found found = find(i < gridDim.x ? all[i] : 0, target, search);
        if (found.at != NOWHERE) {
            block = first + found.at;
            target -= found.before;
            break;
        }
        target -= found.total;
    }
    Found found = find(weigh_share(logits, candidates, draw, most, block, weights, ids), target, search);
    if (threadIdx.x != found.at) return;
    target -= found.before;
    for (int k = 0; k < EACH; k++) {
        if (target <= weights[k]) {
            state->id = ids[k];
            break;
        }
        target -= weights[k];
    }
    state->done = 0;
}
EXPORT(choose_any)

// Adds to bins in shared memory. Weights that fall into few bins, as those of the first digits do, are added up first: threads
// that add to one place wait for each other.
__device__ __forceinline__ void add_to_bins(bool in, unsigned bin, Sum weight, Search& search) {
    unsigned lane = threadIdx.x % 32, open = __ballot_sync(EVERY_LANE, in);
    for (int round = 0; round < 2 && open; round++) {
        unsigned leader = __ffs((int)open) - 1;
        unsigned its = __shfl_sync(EVERY_LANE, bin, (int)leader);
        bool same = in && bin == its;
        unsigned together = __ballot_sync(EVERY_LANE, same);
        Sum sum = same ? weight : 0;
        for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(EVERY_LANE, sum, apart);
        if (lane == leader) {
            atomicAdd(&search.bins[bin], sum);
            atomicAdd(&search.counts[bin], (unsigned)__popc(together));
        }
        in = in && !same;
        open &= ~together;
    }
    if (in) {
        atomicAdd(&search.bins[bin], weight);
        atomicAdd(&search.counts[bin], 1u);
    }
}

// A candidate of the nucleus is a rank: how far its logit is below the greatest, in ordered numbers, and then its id. Ranks
// ascend as the definition goes, and no two are equal.
struct Ranks {
    const volatile Sum* rank;
    unsigned count;
    unsigned top; // the greatest logit's number
    int bits;     // of the largest rank
};

// Finds, digit by digit, the rank in whose weight `target` lies (counted from 1): all but the lowest `open` bits of it, which
// no other rank shares.
struct Place {
    Sum rank, before, weight;
    int open;
};

__device__ __forceinline__ Place place_of(const Ranks& ranks, Sum target, float most, const Draw& draw, Search& search) {
    Place place = {0, 0, 0, ranks.bits};
    bool alone = false;
    while (place.open > 0 && !alone) {
        int step = min(place.open, DIGIT), shift = place.open - step;
        if (threadIdx.x < BINS) {
            search.bins[threadIdx.x] = 0;
            search.counts[threadIdx.x] = 0;
        }
        __syncthreads();
        for (unsigned first = 0; first < ranks.count; first += THREADS) {
            unsigned i = first + threadIdx.x;
            Sum rank = i < ranks.count ? ranks.rank[i] : 0;
            bool in = i < ranks.count && rank >> shift >> step == place.rank;
            float logit = unordered(ranks.top - (unsigned)(rank >> draw.id_bits));
            Sum weight = in ? weight_of(logit, most, draw) : 0;
            add_to_bins(in, (unsigned)(rank >> shift) & ((1u << step) - 1), weight, search);
        }
        __syncthreads();
        Found found = find(threadIdx.x < BINS ? search.bins[threadIdx.x] : 0, target - place.before, search);
        unsigned digit = found.at == NOWHERE ? 0 : found.at;
        alone = search.counts[digit] <= 1;
        place = Place{place.rank << step | digit, place.before + found.before, found.weight, shift};
        __syncthreads();
    }
    return place;
}

// Behind choose_most, which found one: the candidate in whose weight the point lies, of the most probable ones that together
// reach the share, in the order of their ranks. The grid covers the candidates; `list` has room for each.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    choose_nucleus(const float* logits, Candidates candidates, Draw draw, State* state, Sum* list) {
    __shared__ Search search;
    if (state->outcome != TOKEN) return;
    float most = state->logit;
    unsigned lane = threadIdx.x % 32, top = ordered(most);
    // All that are within reach go to the list, in any order. The others add up to less than what the nucleus leaves out.
    Sum sum = 0;
    for (int k = 0; k < EACH; k++) {
        unsigned id = 0;
        bool near = false;
        Sum rank = 0;
        if (candidate(candidates, blockIdx.x * SHARE + k * THREADS + threadIdx.x, id)) {
            float logit = logits[id];
            sum += weight_of(logit, most, draw);
            near = most - logit <= draw.reach;
            rank = (Sum)(top - ordered(logit)) << draw.id_bits | id;
        }
        unsigned together = __ballot_sync(EVERY_LANE, near), at = 0;
        if (!together) continue;
        if (lane == 0) at = atomicAdd(&state->listed, (unsigned)__popc(together));
        at = __shfl_sync(EVERY_LANE, at, 0);
        if (near) list[at + __popc(together & ((1u << lane) - 1))] = rank;
    }
    sum = total_of(sum, search);
    if (threadIdx.x == 0) atomicAdd(&state->total, sum);
    if (!is_last(state)) return;
    const volatile State* all = state;
    Sum total = all->total;
    if (threadIdx.x == 0) search.rank = state->id; // the greatest, would there be no other
    // A difference that is rounded may be a few numbers more than the reach.
    unsigned furthest = top - ordered(most - draw.reach) + 8;
    Ranks ranks = {list, all->listed, top, draw.id_bits + 32 - __clz((int)furthest)};
    // The share, rounded up.
    Sum target = __umul64hi(draw.share, total) + (draw.share * total != 0);
    Place last = place_of(ranks, target, most, draw, search);
    Sum kept = last.before + last.weight;
    Place chosen = place_of(ranks, __umul64hi(draw.point, kept) + 1, most, draw, search);
    for (unsigned i = threadIdx.x; i < ranks.count; i += THREADS) {
        Sum rank = ranks.rank[i];
        if (rank >> chosen.open == chosen.rank) search.rank = rank;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    state->id = (unsigned)(search.rank & (((Sum)1 << draw.id_bits) - 1));
    state->total = 0;
    state->listed = 0;
    state->done = 0;
}
EXPORT(choose_nucleus)
