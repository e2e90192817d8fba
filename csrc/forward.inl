// The forward pass: log-probs, statistics and d logp / d hidden, block of rows by block of rows.

// What a slice of the vocabulary finds for a panel: the fields of Running, lane by lane, the
// target's logit, and d logp / d hidden (width, ROWS), without the target's share.
enum Field { kMax, kSum, kLargest, kWeighted, kTotal, kSquares, kTarget, kFields };

inline int64_t part_size(const Problem& p) {
  return (kFields + (p.dlogp_dhidden ? p.width : 0)) * ROWS;
}

// The operand of d logp / d hidden, token by token: numbers of a panel, or pairs of bfloat16.
template <bool PAIRS>
inline void put_weights(uint32_t* weights, int64_t v, int64_t count, const vf* e, vf* before) {
  for (int j = 0; j < VECTORS; j++) {
    if (!PAIRS)
      store(reinterpret_cast<float*>(weights) + v * ROWS + j * LANES, e[j]);
    else if (v % 2)
      *reinterpret_cast<vu*>(weights + v / 2 * ROWS + j * LANES) = interleave(before[j], e[j]);
    else if (v + 1 == count)
      *reinterpret_cast<vu*>(weights + v / 2 * ROWS + j * LANES) = interleave(e[j], vf{});
    before[j] = e[j];
  }
}

// Whether d logp / d hidden of a panel is asked for.
inline bool wants_direction(const Problem& p, int64_t panel) {
  const int64_t first = panel * ROWS;
  if (!p.dlogp_dhidden || first < p.dhidden_from || first >= p.dhidden_to) return false;
  bool any = !p.again;
  for (int64_t row = first; p.again && row < std::min(first + ROWS, p.rows); row++)
    any |= p.dlogp[row] != 0.0f;
  return any;
}

// exp(z - lse) of one tile for one panel, as an earlier pass kept it, as the operand of the
// dlogp_dhidden.
template <bool PAIRS>
void recall_tile(const Problem& p, int64_t panel, int64_t count, const uint16_t* kept,
                 const float* kept_max, uint32_t* weights) {
  alignas(64) float lse[ROWS];
  for (int64_t lane = 0; lane < ROWS; lane++)
    lse[lane] = panel * ROWS + lane < p.rows ? p.lse[panel * ROWS + lane] : 0.0f;
  vf scale[VECTORS], before[VECTORS];
  for (int j = 0; j < VECTORS; j++) {
    before[j] = vf{};
    scale[j] = exponential(load(kept_max + j * LANES) - load(lse + j * LANES));
  }
  for (int64_t v = 0; v < count; v++) {
    vf e[VECTORS];
    for (int j = 0; j < VECTORS; j++) e[j] = scale[j] * load_f16(kept + v * ROWS + j * LANES);
    put_weights<PAIRS>(weights, v, count, e, before);
  }
}

// The logits of one tile for one panel: updates the running softmax, and leaves exp(z - max) (times
// the slope, under softcap) as the operand of d logp / d hidden. Returns whether d logp / d hidden
// so far must be scaled by `factor`. EXTRA: statistics or softcap are wanted.
template <bool PAIRS, bool EXTRA>
bool softmax_tile(const Problem& p, int64_t count, const float* z, Running* running, vf* factor,
                  uint32_t* weights, uint16_t* kept, float* kept_max) {
  vf top[VECTORS], sum[VECTORS], max[VECTORS], before[VECTORS];
  for (int j = 0; j < VECTORS; j++) top[j] = all(std::numeric_limits<float>::lowest());
  for (int64_t v = 0; v < count; v++)
    for (int j = 0; j < VECTORS; j++) top[j] = larger(load(z + v * ROWS + j * LANES), top[j]);
  bool moved = false;
  for (int j = 0; j < VECTORS; j++) {
    moved |= rebase(running[j], top[j], factor[j]);
    max[j] = running[j].max;
    sum[j] = before[j] = vf{};
    if (kept) store(kept_max + j * LANES, max[j]);
  }
  for (int64_t v = 0; v < count; v++) {
    vf e[VECTORS];
    for (int j = 0; j < VECTORS; j++) {
      const vf logit = load(z + v * ROWS + j * LANES), shifted = logit - max[j];
      e[j] = exponential(shifted);
      sum[j] += e[j];
      if (!EXTRA) continue;
      Running& r = running[j];
      if (p.entropy) r.weighted += select(e[j] > 0.0f, e[j] * shifted, e[j]);
      if (p.mean_logits) r.total += logit;
      if (p.aligned_logps) r.squares += e[j] * e[j];
    }
    if (kept) keep(kept + v * ROWS, e);
    if (!weights) continue;
    if (EXTRA && p.softcap)
      for (int j = 0; j < VECTORS; j++) e[j] *= slope(p, load(z + v * ROWS + j * LANES));
    put_weights<PAIRS>(weights, v, count, e, before);
  }
  for (int j = 0; j < VECTORS; j++) add_exactly(running[j], sum[j]);
  return moved;
}

// Adds what another slice of the vocabulary found for the same panel.
void merge(const Problem& p, float* total, const float* part) {
  for (int64_t j = 0; j < ROWS; j += LANES) {
    auto field = [&](float* of, Field which) { return of + which * ROWS + j; };
    auto other = [&](Field which) { return load(part + which * ROWS + j); };
    const vf old = load(field(total, kMax)), max = larger(old, other(kMax));
    const vf shift = larger(old - max, all(-1e4f)),
             other_shift = larger(other(kMax) - max, all(-1e4f));
    const vf factor = exponential(shift), other_factor = exponential(other_shift);
    const vf sum = load(field(total, kSum)), weighted = load(field(total, kWeighted));
    store(field(total, kWeighted),
          factor * (weighted + select(sum > 0.0f, shift * sum, vf{})) +
              other_factor *
                  (other(kWeighted) + select(other(kSum) > 0.0f, other_shift * other(kSum), vf{})));
    store(field(total, kMax), max);
    store(field(total, kSum), factor * sum + other_factor * other(kSum));
    store(field(total, kLargest), larger(load(field(total, kLargest)), other(kLargest)));
    store(field(total, kTotal), load(field(total, kTotal)) + other(kTotal));
    store(field(total, kSquares), factor * factor * load(field(total, kSquares)) +
                                      other_factor * other_factor * other(kSquares));
    // Only the slice that holds the target knows its logit; the others hold 0.
    store(field(total, kTarget), load(field(total, kTarget)) + other(kTarget));
    if (!p.dlogp_dhidden) continue;
    for (int64_t h = 0; h < p.width; h++) {
      float* at = total + (kFields + h) * ROWS + j;
      store(at, factor * load(at) + other_factor * load(part + (kFields + h) * ROWS + j));
    }
  }
}

// The dlogp_dhidden of one row, from exp(z - max) @ weight and the sum of exp(z - max); the
// target's own share is exact: near certainty, 1 - p would drown in the rounding of p.
inline void finish_direction(const Problem& p, int64_t row, double logp, float target, double sum,
                             const float* others) {
  const Operand weight = weight_of(p);
  const float of_target =
      float(-std::expm1(logp)) * (p.softcap ? slope(p, all(target))[0] : p.scale);
  const float of_others = float((p.softcap ? 1.0 : double(p.scale)) / sum);
  for (int64_t h = 0; h < p.width; h++)
    p.dlogp_dhidden[row * p.width + h] =
        of_target * weight.value(p.targets[row] * p.weight_stride + h) -
        of_others * others[h * ROWS];
}

// Log-probs, statistics and d logp / d hidden of one panel, once the whole vocabulary has gone by.
void finish_panel(const Problem& p, int64_t panel, const float* part) {
  const int64_t first = panel * ROWS, there = std::min(ROWS, p.rows - first);
  const bool directed = wants_direction(p, panel);
  for (int64_t lane = 0; lane < there; lane++) {
    const int64_t row = first + lane;
    auto field = [&](Field which) { return double(part[which * ROWS + lane]); };
    const double sum = field(kSum), log_sum = std::log(sum), target = field(kTarget);
    const double logp = target - field(kMax) - log_sum;
    if (p.again) {
      if (directed) finish_direction(p, row, p.logps[row], 0.0f, 1.0, part + kFields * ROWS + lane);
      continue;
    }
    p.lse[row] = float(log_sum + field(kMax));
    p.logps[row] = float(logp);
    if (p.entropy) p.entropy[row] = float(log_sum - field(kWeighted) / sum);
    if (p.mean_logits) p.mean_logits[row] = float(field(kTotal) / double(p.vocabulary));
    if (p.token_accuracy) p.token_accuracy[row] = target >= field(kLargest) ? 1.0f : 0.0f;
    if (p.aligned_logps)
      p.aligned_logps[row] = float(logp - (std::log(field(kSquares)) - 2.0 * log_sum));
    if (p.max_logit) p.max_logit[row] = float(field(kLargest));
    if (directed) finish_direction(p, row, logp, float(target), sum, part + kFields * ROWS + lane);
  }
}

// Blocks of at most BLOCK panels, as even as can be, for threads and rows alike: [first_panel(b),
// first_panel(b + 1)).
inline int64_t panels_of(const Problem& p) { return (p.rows + ROWS - 1) / ROWS; }
inline int64_t blocks_of(const Problem& p) {
  const int64_t least = (panels_of(p) + BLOCK - 1) / BLOCK;
  return least < 4 * p.threads ? least : (least + p.threads - 1) / p.threads * p.threads;
}
inline int64_t first_panel(const Problem& p, int64_t block) {
  return panels_of(p) * block / blocks_of(p);
}
inline int64_t panels_in(const Problem& p, int64_t block) {
  return first_panel(p, block + 1) - first_panel(p, block);
}

// Takes the targets of a panel out of the operand of its dlogp_dhidden.
template <bool PAIRS>
void without_targets(const Problem& p, int64_t panel, int64_t token, int64_t count,
                     uint32_t* weights) {
  for (int64_t lane = 0; lane < ROWS && panel * ROWS + lane < p.rows; lane++) {
    const int64_t here = p.targets[panel * ROWS + lane] - token;
    if (here < 0 || here >= count) continue;
    uint32_t& word = weights[(PAIRS ? here / 2 : here) * ROWS + lane];
    word &= !PAIRS ? 0u : here % 2 ? 0xffffu : 0xffff0000u;
  }
}

// One slice of the vocabulary for the panels of one block; `parts` has one part a panel.
template <bool PAIRS>
void forward_slice(const Problem& p, int64_t block, int64_t slice, const uint32_t* packed,
                   float* parts) {
  const int64_t panels = panels_of(p), start = first_panel(p, block), mine = panels_in(p, block);
  const int64_t depth = words<PAIRS>(p.width), part_stride = part_size(p),
                tiles = (p.vocabulary + TILE - 1) / TILE;
  const int64_t first = tiles * slice / SLICES, last = tiles * (slice + 1) / SLICES;
  const bool extra = p.softcap || p.entropy || p.mean_logits || p.aligned_logps;
  Scratch logits(TILE * ROWS), weights(TILE * ROWS), copy(TILE * depth),
      columns(PAIRS ? TILE / 2 * p.width : 1);
  Running running[BLOCK][VECTORS];
  bool directed[BLOCK], any_directed = false;
  for (int64_t i = 0; i < mine; i++) {
    any_directed |= directed[i] = wants_direction(p, start + i);
    for (int64_t j = 0; j < VECTORS; j++) reset(running[i][j]);
    std::fill(parts + i * part_stride + kTarget * ROWS, parts + (i + 1) * part_stride, 0.0f);
  }
  for (int64_t t = first; t < last && (any_directed || !p.again); t++) {
    const int64_t token = t * TILE, count = std::min(TILE, p.vocabulary - token);
    const Tile rows = weight_rows<PAIRS>(p, token, count, copy.get());
    const Tile by_column =
        any_directed ? weight_columns<PAIRS>(p, rows, count, columns.get()) : Tile{};
    for (int64_t i = 0; i < mine; i++) {
      const int64_t panel = start + i, place = t * panels + panel;
      float *part = parts + i * part_stride, *dlogp_dhidden = part + kFields * ROWS;
      uint16_t* kept = p.kept ? p.kept + place * TILE * ROWS : nullptr;
      float* kept_max = p.kept ? p.kept_max + place * ROWS : nullptr;
      if (t + 1 < last) prefetch_weights(p, token + TILE + TILE * i / mine, TILE / mine);
      if (p.again) {
        if (!directed[i]) continue;
        recall_tile<PAIRS>(p, panel, count, kept, kept_max, weights.get());
      } else {
        float* z = logits.floats();
        product<PAIRS>(count, depth, rows.data, rows.stride, 1, packed + i * depth * ROWS, z, ROWS,
                       false);
        transform(p, token, count, z);
        for (int64_t lane = 0; lane < ROWS && panel * ROWS + lane < p.rows; lane++) {
          const int64_t here = p.targets[panel * ROWS + lane] - token;
          if (here >= 0 && here < count) part[kTarget * ROWS + lane] = z[here * ROWS + lane];
        }
        vf factor[VECTORS];
        const bool moved =
            (extra ? softmax_tile<PAIRS, true>
                   : softmax_tile<PAIRS, false>)(p, count, z, running[i], factor,
                                                 directed[i] ? weights.get() : nullptr, kept,
                                                 kept_max);
        if (!directed[i]) continue;
        if (moved && t > first)
          for (int64_t h = 0; h < p.width; h++)
            for (int64_t j = 0; j < VECTORS; j++)
              store(dlogp_dhidden + h * ROWS + j * LANES,
                    factor[j] * load(dlogp_dhidden + h * ROWS + j * LANES));
      }
      without_targets<PAIRS>(p, panel, token, count, weights.get());
      product<PAIRS>(p.width, words<PAIRS>(count), by_column.data, 1, by_column.stride,
                     weights.get(), dlogp_dhidden, ROWS, true);
    }
  }
  for (int64_t i = 0; i < mine; i++)
    for (int64_t j = 0; j < VECTORS; j++) {
      const Running& r = running[i][j];
      float* part = parts + i * part_stride + j * LANES;
      store(part + kMax * ROWS, r.max);
      store(part + kSum * ROWS, r.sum);
      store(part + kLargest * ROWS, r.largest);
      store(part + kWeighted * ROWS, r.weighted);
      store(part + kTotal * ROWS, r.total);
      store(part + kSquares * ROWS, r.squares);
    }
}

// Runs f(0) ... f(count - 1) on the problem's threads; which thread runs what does not change a
// result.
template <class F>
void parallel(const Problem& p, int64_t count, const F& f) {
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.threads)
#endif
  for (int64_t i = 0; i < count; i++) f(i);
}

template <bool PAIRS>
void pack_block(const Problem& p, int64_t block, uint32_t* packed) {
  const int64_t words_of_panel = words<PAIRS>(p.width) * ROWS;
  for (int64_t i = 0; i < panels_in(p, block); i++)
    pack_rows<PAIRS>(p, (first_panel(p, block) + i) * ROWS, packed + i * words_of_panel);
}

// The vocabulary goes by in slices that depend on nothing but its size, and they are merged in
// order: a row's log-prob is the same whatever rows it comes with, and however many threads there
// are.
template <bool PAIRS>
void forward_as(const Problem& p) {
  const int64_t panels = panels_of(p), blocks = blocks_of(p), size = part_size(p);
  const int64_t words_of_block = BLOCK * words<PAIRS>(p.width) * ROWS;
  const bool room = SLICES * panels * size * 4 <= p.scratch_bytes;
  if (blocks >= 4 * p.threads || !room) {
    parallel(p, blocks, [&](int64_t block) {
      Scratch packed(words_of_block), totals(BLOCK * size), parts(BLOCK * size);
      pack_block<PAIRS>(p, block, packed.get());
      for (int64_t slice = 0; slice < SLICES; slice++) {
        forward_slice<PAIRS>(p, block, slice, packed.get(),
                             slice ? parts.floats() : totals.floats());
        for (int64_t i = 0; slice && i < panels_in(p, block); i++)
          merge(p, totals.floats() + i * size, parts.floats() + i * size);
      }
      for (int64_t i = 0; i < panels_in(p, block); i++)
        finish_panel(p, first_panel(p, block) + i, totals.floats() + i * size);
    });
    return;
  }
  // Few rows: let the slices run side by side.
  Scratch packed(blocks * words_of_block), parts(SLICES * panels * size);
  parallel(p, blocks, [&](int64_t block) {
    pack_block<PAIRS>(p, block, packed.get() + block * words_of_block);
  });
  parallel(p, blocks * SLICES, [&](int64_t item) {
    const int64_t block = item % blocks, slice = item / blocks;
    forward_slice<PAIRS>(p, block, slice, packed.get() + block * words_of_block,
                         parts.floats() + (slice * panels + first_panel(p, block)) * size);
  });
  parallel(p, panels, [&](int64_t panel) {
    float* total = parts.floats() + panel * size;
    for (int64_t slice = 1; slice < SLICES; slice++) merge(p, total, total + slice * panels * size);
    finish_panel(p, panel, total);
  });
}
