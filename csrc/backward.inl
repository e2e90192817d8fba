// The second pass: dWeight and dBias, tile of tokens by tile of tokens.

// Fetches the gradients of ROWS columns ahead of the product that adds to them: the accumulators
// are loaded before it starts, and dWeight is larger than the caches.
inline void prefetch_rows(const float* gradient, int64_t count, int64_t width, int64_t column) {
  if (column >= width) return;
  for (int64_t v = 0; v < count; v++)
    for (int64_t j = 0; j < ROWS; j += 16)
      __builtin_prefetch(gradient + v * width + column + j, 1, 2);
}

// Adds the gradients of one tile of tokens, over all rows: G = c * (onehot - softmax) * slope, then
// G . hidden.
template <bool PAIRS>
void backward_tile(const Problem& p, int64_t t, const int64_t* live, int64_t busy,
                   const uint32_t* packed, const uint32_t* by_column, int64_t all_depth) {
  const int64_t panels = panels_of(p), depth = words<PAIRS>(p.width),
                column_panels = (p.width + ROWS - 1) / ROWS;
  const int64_t token = t * TILE, count = std::min(TILE, p.vocabulary - token),
                step = words<PAIRS>(BACKWARD_BLOCK * ROWS);
  Scratch logits(TILE * ROWS), gradient(TILE * step), copy(p.kept ? 1 : TILE * depth),
      rest(TILE * ROWS);
  const Tile rows = p.kept ? Tile{} : weight_rows<PAIRS>(p, token, count, copy.get());
  if (p.dweight) prefetch_rows(p.dweight + token * p.width, count, p.width, 0);
  if (p.fresh && p.dbias) std::fill(p.dbias + token, p.dbias + token + count, 0.0f);
  const int64_t blocks = (busy + BACKWARD_BLOCK - 1) / BACKWARD_BLOCK;
  for (int64_t block = 0; block < blocks; block++) {
    const bool add = !p.fresh || block > 0;
    const int64_t start = busy * block / blocks, mine = busy * (block + 1) / blocks - start;
    for (int64_t i = 0; i < mine; i++) {
      const int64_t panel = live[start + i], place = t * panels + panel;
      float* z = logits.floats();
      alignas(64) float c[ROWS], lse[ROWS];
      for (int64_t lane = 0; lane < ROWS; lane++) {
        const bool there = panel * ROWS + lane < p.rows;
        c[lane] = there ? p.dlogp[panel * ROWS + lane] : 0.0f;
        lse[lane] = there ? p.lse[panel * ROWS + lane] : 0.0f;
      }
      if (!p.kept) {
        product<PAIRS>(count, depth, rows.data, rows.stride, 1, packed + (start + i) * depth * ROWS,
                       z, ROWS, false);
        transform(p, token, count, z);
      }
      for (int64_t j = 0; j < VECTORS; j++) {
        const vf own = load(c + j * LANES), norm = load(lse + j * LANES);
        const vf kept_scale =
            p.kept ? own * p.scale * exponential(load(p.kept_max + place * ROWS + j * LANES) - norm)
                   : vf{};
        for (int64_t v = 0; v < count; v++) {
          float* at = z + v * ROWS + j * LANES;
          if (p.kept) {
            store(at, -kept_scale * load_f16(p.kept + (place * TILE + v) * ROWS + j * LANES));
          } else {
            const vf logit = load(at);
            store(at, -own * exponential(logit - norm) * slope(p, logit));
          }
        }
      }
      for (int64_t lane = 0; lane < ROWS && panel * ROWS + lane < p.rows; lane++) {
        const int64_t row = panel * ROWS + lane, here = p.targets[row] - token;
        if (here < 0 || here >= count) continue;
        // c * (1 - p) * slope, with p and the target's logit as the forward pass found them.
        const float logp = p.logps[row];
        const float at_target = p.softcap ? slope(p, all(logp + p.lse[row]))[0] : p.scale;
        z[here * ROWS + lane] = -c[lane] * std::expm1(logp) * at_target;
      }
      if (p.dbias)
        for (int64_t v = 0; v < count; v++) {
          double sum = 0;
          for (int64_t lane = 0; lane < ROWS; lane++) sum += z[v * ROWS + lane];
          p.dbias[token + v] += float(sum);
        }
      if (!p.dweight) continue;
      for (int64_t v = 0; v < count; v++)
        for (int64_t j = 0; j < VECTORS; j++) {
          const vf g = load(z + v * ROWS + j * LANES);
          uint32_t* to = gradient.get() + v * step + words<PAIRS>(i * ROWS + j * LANES);
          if (PAIRS)
            store_bf16(to, g);
          else
            store(reinterpret_cast<float*>(to), g);
        }
    }
    if (!p.dweight) continue;
    for (int64_t panel = 0; panel < column_panels; panel++) {
      const uint32_t* b = by_column + (panel * all_depth + words<PAIRS>(start * ROWS)) * ROWS;
      prefetch_rows(p.dweight + token * p.width, count, p.width, (panel + 1) * ROWS);
      float* to = p.dweight + token * p.width + panel * ROWS;
      if ((panel + 1) * ROWS <= p.width) {
        product<PAIRS>(count, words<PAIRS>(mine * ROWS), gradient.get(), step, 1, b, to, p.width,
                       add);
      } else {
        product<PAIRS>(count, words<PAIRS>(mine * ROWS), gradient.get(), step, 1, b, rest.floats(),
                       ROWS, false);
        for (int64_t v = 0; v < count; v++)
          for (int64_t j = 0; panel * ROWS + j < p.width; j++)
            to[v * p.width + j] = (add ? to[v * p.width + j] : 0.0f) + rest.floats()[v * ROWS + j];
      }
    }
  }
}

// Panels whose rows all have a dlogp of 0 cost nothing.
template <bool PAIRS>
void backward_as(const Problem& p) {
  const std::unique_ptr<int64_t[]> live(new int64_t[size_t(panels_of(p))]);
  int64_t busy = 0;
  for (int64_t panel = 0; panel < panels_of(p); panel++) {
    bool any = false;
    for (int64_t row = panel * ROWS; row < std::min((panel + 1) * ROWS, p.rows); row++)
      any |= p.dlogp[row] != 0.0f;
    if (any) live[size_t(busy++)] = panel;
  }
  const int64_t depth = words<PAIRS>(p.width), column_panels = (p.width + ROWS - 1) / ROWS;
  const int64_t all_depth = words<PAIRS>(busy * ROWS);
  Scratch packed(p.kept ? 1 : busy * depth * ROWS),
      by_column(p.dweight ? column_panels * all_depth * ROWS : 1);
  if (!p.kept)
    parallel(p, busy, [&](int64_t i) {
      pack_rows<PAIRS>(p, live[size_t(i)] * ROWS, packed.get() + i * depth * ROWS);
    });
  if (p.dweight)
    parallel(p, column_panels, [&](int64_t column) {
      uint32_t* to = by_column.get() + column * all_depth * ROWS;
      for (int64_t i = 0; i < busy; i++)
        pack_columns<PAIRS>(p, column * ROWS, live[size_t(i)] * ROWS,
                            to + words<PAIRS>(i * ROWS) * ROWS);
    });
  parallel(p, (p.vocabulary + TILE - 1) / TILE, [&](int64_t t) {
    backward_tile<PAIRS>(p, t, live.get(), busy, packed.get(), by_column.get(), all_depth);
  });
}
