// The second pass: dWeight and dBias, tile of tokens by tile of tokens.

// Adds the gradients of one tile of tokens, over all rows: G = c * (onehot - softmax) * slope, then
// G . hidden.
template <bool PAIRS>
void backward_tile(const Problem& p, int64_t t, const uint32_t* packed, const uint32_t* by_column,
                   int64_t all_depth) {
  const int64_t panels = (p.rows + ROWS - 1) / ROWS, depth = words<PAIRS>(p.width),
                column_panels = (p.width + ROWS - 1) / ROWS;
  const int64_t token = t * TILE, count = std::min(TILE, p.vocabulary - token),
                step = words<PAIRS>(BLOCK * ROWS);
  Scratch logits(TILE * ROWS), gradient(TILE * step), copy(p.kept ? 1 : TILE * depth),
      rest(TILE * ROWS);
  const Tile rows = p.kept ? Tile{} : weight_rows<PAIRS>(p, token, count, copy.get());
  if (p.fresh && p.bias_gradient)
    std::fill(p.bias_gradient + token, p.bias_gradient + token + count, 0.0f);
  for (int64_t block = 0; block * BLOCK < panels; block++) {
    const bool add = !p.fresh || block > 0;
    const int64_t mine = std::min(BLOCK, panels - block * BLOCK);
    for (int64_t i = 0; i < mine; i++) {
      const int64_t panel = block * BLOCK + i, place = t * panels + panel;
      float* z = logits.floats();
      alignas(64) float c[ROWS], lse[ROWS];
      for (int64_t lane = 0; lane < ROWS; lane++) {
        const bool there = panel * ROWS + lane < p.rows;
        c[lane] = there ? p.coefficients[panel * ROWS + lane] : 0.0f;
        lse[lane] = there ? p.lse[panel * ROWS + lane] : 0.0f;
      }
      if (!p.kept) {
        product<PAIRS>(count, depth, rows.data, rows.stride, 1, packed + panel * depth * ROWS, z,
                       ROWS, false);
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
      if (p.bias_gradient)
        for (int64_t v = 0; v < count; v++) {
          double sum = 0;
          for (int64_t lane = 0; lane < ROWS; lane++) sum += z[v * ROWS + lane];
          p.bias_gradient[token + v] += float(sum);
        }
      if (!p.weight_gradient) continue;
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
    if (!p.weight_gradient) continue;
    for (int64_t panel = 0; panel < column_panels; panel++) {
      const uint32_t* b = by_column + (panel * all_depth + block * step) * ROWS;
      float* to = p.weight_gradient + token * p.width + panel * ROWS;
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

template <bool PAIRS>
void backward_as(const Problem& p) {
  const int64_t panels = (p.rows + ROWS - 1) / ROWS, depth = words<PAIRS>(p.width),
                column_panels = (p.width + ROWS - 1) / ROWS;
  const int64_t all_depth = words<PAIRS>(panels * ROWS);
  Scratch packed(p.kept ? 1 : panels * depth * ROWS),
      by_column(p.weight_gradient ? column_panels * all_depth * ROWS : 1);
  if (!p.kept)
    parallel(p, panels, [&](int64_t panel) {
      pack_rows<PAIRS>(p, panel * ROWS, packed.get() + panel * depth * ROWS);
    });
  if (p.weight_gradient)
    parallel(p, column_panels, [&](int64_t panel) {
      pack_columns<PAIRS>(p, panel * ROWS, all_depth, by_column.get() + panel * all_depth * ROWS);
    });
  parallel(p, (p.vocabulary + TILE - 1) / TILE, [&](int64_t t) {
    backward_tile<PAIRS>(p, t, packed.get(), by_column.get(), all_depth);
  });
}
