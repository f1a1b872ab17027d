// Every kernel of embed_layer_norm that this CPU runs, against double precision; see bsr_linear.cpp.
#include "../../csrc/cpu/embed_layer_norm/embed_layer_norm.h"

#include <vector>

#include "layer_norm.h"

#define FORWARD(isa, dtype, suffix) EmbedLayerNormKernel embed_layer_norm_##dtype##_##suffix;
#include "../../csrc/cpu/embed_layer_norm/embed_layer_norm.inc"

namespace {

struct Entry {
  int isa;
  Dtype dtype;
  EmbedLayerNormKernel* run;
  int64_t calls;
};

#define FORWARD(isa, dtype, suffix) {isa, dtype, embed_layer_norm_##dtype##_##suffix, 0},
Entry kernels[] = {
#include "../../csrc/cpu/embed_layer_norm/embed_layer_norm.inc"
};

Failures failures;

enum Indices : int { kNone, kDefault, kGiven, kShared, kIndicesCount };  // kNone: no table at all

std::vector<int64_t> indices(Random& random, int64_t count, int64_t rows) {
  std::vector<int64_t> ids(count);
  for (int64_t& id : ids) id = random.below(rows);
  return ids;
}

void run(Dtype dtype, int64_t B, int64_t S, int64_t H, int positions, int types, bool with_bias, int parts, Random& random) {
  const int64_t M = B * S, words = 11, rows = S + 2;
  Array word(dtype, words * H), position(dtype, rows * H), token_type(dtype, 3 * H), weight(dtype, H), bias(dtype, H);
  for (Array* table : {&word, &position, &token_type}) table->fill(random, -2, 2);
  weight.fill(random, 0.5, 1.5);
  bias.fill(random, -1, 1);
  const std::vector<int64_t> ids = indices(random, M, words);
  const std::vector<int64_t> position_ids = indices(random, positions == kShared ? S : M, rows);
  const std::vector<int64_t> type_ids = indices(random, types == kShared ? S : M, 3);
  for (Entry& kernel : kernels) {
    if (kernel.dtype != dtype || !isa_supported(kernel.isa)) continue;
    kernel.calls++;
    Array y(dtype, M * H);
    EmbedLayerNorm a{};
    a.ids = ids.data();
    a.position_ids = positions >= kGiven ? position_ids.data() : nullptr;
    a.token_type_ids = types >= kGiven ? type_ids.data() : nullptr;
    a.word = word.data();
    a.position = positions != kNone ? position.data() : nullptr;
    a.token_type = types != kNone ? token_type.data() : nullptr;
    a.weight = weight.data();
    a.bias = with_bias ? bias.data() : nullptr;
    a.y = y.data();
    a.M = M;
    a.S = S;
    a.H = H;
    a.position_count = (int64_t)position_ids.size();
    a.token_type_count = (int64_t)type_ids.size();
    a.eps = 1e-5f;
    Scratch scratch(a.scratch());
    for (int part = parts; part-- > 0;) kernel.run(a, part, parts, scratch.poisoned());
    if (!y.front_untouched()) failures.add("wrote in front of the result");
    for (int64_t m = 0; m < M; m++) {
      Row row(H);
      row.add(word, ids[m]);
      if (types != kNone) row.add(token_type, types == kDefault ? 0 : type_ids[types == kShared ? m % S : m]);
      if (positions != kNone)
        row.add(position, positions == kDefault ? m % S : position_ids[positions == kShared ? m % S : m]);
      const int64_t wrong = first_wrong(row, weight, with_bias ? &bias : nullptr, 1e-5f, y, m, dtype);
      if (wrong < 0) continue;
      failures.add("embed_layer_norm %s %s B=%ld S=%ld H=%ld positions=%d types=%d bias=%d parts=%d: wrong at [%ld][%ld], %.9g",
                   dtype_name(dtype), isa_name(kernel.isa), (long)B, (long)S, (long)H, positions, types, with_bias, parts,
                   (long)m, (long)wrong, y.get(m * H + wrong));
      break;
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  const bool quick = count > 1 && !strcmp(arguments[1], "--quick");
  setvbuf(stdout, nullptr, _IOLBF, 0);
  Random random(1);
  std::vector<int64_t> Hs = {384, 1000};
  for (int64_t H = 1; H <= 70; H += quick ? 3 : 1) Hs.push_back(H);
  for (Dtype dtype : {f32, bf16})
    for (int64_t H : Hs)
      for (int positions = 0; positions < kIndicesCount; positions++)
        for (int types = 0; types < kIndicesCount; types++) {
          const int parts[] = {1, 2, 3, 7};
          run(dtype, 1 + random.below(3), 1 + random.below(4), H, positions, types, random.below(2),
              parts[random.below(4)], random);
        }
  return report("embed_layer_norm", "forward", kernels, failures);
}
