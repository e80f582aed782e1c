// A decode step through all decoder layers. What the layers and the caches are is read, and checked, once and remembered under a
// number: between the products of two layers there is then nothing to convert.
#include <algorithm>
#include <map>
#include <memory>
#include <mutex>

#include "step.h"

namespace {

using namespace moacompress;

// Decoder layers in their order. Holds the tensors, and knows when one of them was given other memory or another layout.
struct Layers {
  Tensors held;
  std::vector<std::pair<const void*, int64_t>> memory;  // of each: where it is, and how many numbers
  std::vector<DecoderLayer> layers;
  std::vector<Rest> rests;
  std::vector<std::optional<Reuse>> reuses;
  std::vector<size_t> value_sets;                      // of each layer: of values beside its own, of layers that share its keys
  std::vector<std::vector<int64_t>> shared_value_bytes;  // of each layer: bytes of their parts, [kv_heads, value sets]
  std::vector<Gate> gates;
  ScalarType type;
  int64_t inputs;

  std::pair<const void*, int64_t> memory_of(size_t i) const { return {held[i].const_data_ptr(), held[i].numel()}; }

  bool same() const {
    for (size_t i = 0; i < held.size(); i++)
      if (memory_of(i) != memory[i] || !held[i].is_contiguous()) return false;
    return true;
  }
};

// The caches of decoder layers for some rows, and the tensors that each is of; none of layers that share attention. Used by one
// thread at a time. A cache that is kept does not keep the weights.
struct Caches {
  std::weak_ptr<const Layers> layers;
  int64_t rows;
  std::vector<std::optional<std::pair<LayerCache, Tensors>>> caches;
  std::vector<Scratch> kept;  // of each layer the weights that others copy in the running step
};

// Things that operators name by numbers.
template <class T> class Named {
 public:
  int64_t add(T thing) {
    const std::lock_guard<std::mutex> guard(lock_);
    things_[++last_] = std::make_shared<T>(std::move(thing));
    return last_;
  }
  std::shared_ptr<T> find(int64_t number, const char* op, const char* what) {
    const std::lock_guard<std::mutex> guard(lock_);
    const auto found = things_.find(number);
    REQUIRE(found != things_.end(), op, ": there are no ", what, " of the number ", number);
    return found->second;
  }
  void forget(int64_t number) {
    std::shared_ptr<T> last;  // goes after the lock
    const std::lock_guard<std::mutex> guard(lock_);
    const auto found = things_.find(number);
    if (found == things_.end()) return;
    last = found->second;
    things_.erase(found);
  }

 private:
  std::mutex lock_;
  std::map<int64_t, std::shared_ptr<T>> things_;
  int64_t last_ = 0;
};

Named<Layers>& all_layers() {
  static auto* all = new Named<Layers>;  // never destroyed: the tensors' library may be gone by then
  return *all;
}

Named<Caches>& all_caches() {
  static auto* all = new Named<Caches>;
  return *all;
}

void append(Tensors& to, const Tensors& from) { to.insert(to.end(), from.begin(), from.end()); }

// Reads how layers share attention: of each layer its anchor, -1 for none, then of each KV head the anchor's that it reads and the
// value set of its values.
std::vector<std::optional<Reuse>> reuses_of(const Tensor& shares, size_t count, int64_t kv_heads, const char* op) {
  std::vector<std::optional<Reuse>> found(count);
  const bool none = shares.numel() == 0;
  const auto* at = static_cast<const int64_t*>(dense(shares, {none ? -1 : int64_t(count), none ? -1 : 1 + 2 * kv_heads}, ScalarType::Long, op, "shares"));
  for (size_t i = 0; i < count && !none; i++, at += 1 + 2 * kv_heads) {
    if (at[0] < 0) continue;
    REQUIRE(at[0] < int64_t(i) && !found[size_t(at[0])], op, ": layer ", i, " shares with layer ", at[0],
            ", which is no earlier layer with attention of its own");
    Reuse reuse = {at[0], {at + 1, at + 1 + kv_heads}, {at + 1 + kv_heads, at + 1 + 2 * kv_heads}};
    for (int64_t head = 0; head < kv_heads; head++)
      REQUIRE(reuse.head_map[size_t(head)] >= 0 && reuse.head_map[size_t(head)] < kv_heads && reuse.value_sets[size_t(head)] >= 0 &&
                  reuse.value_sets[size_t(head)] < int64_t(count) * kv_heads,
              op, ": KV head ", head, " of layer ", i, " reads head ", reuse.head_map[size_t(head)], " and value set ",
              reuse.value_sets[size_t(head)]);
    found[i] = std::move(reuse);
  }
  return found;
}

// Takes note of what the layers that share attention keep in the blocks of their anchors.
void count_shared_values(Layers& read) {
  const size_t count = read.layers.size();
  read.value_sets.assign(count, 0);
  read.shared_value_bytes.resize(count);
  for (const auto& reuse : read.reuses)
    if (reuse)
      for (const int64_t value_set : reuse->value_sets) read.value_sets[size_t(reuse->anchor)] = std::max(read.value_sets[size_t(reuse->anchor)], size_t(value_set) + 1);
  for (size_t i = 0; i < count; i++)
    if (const auto& reuse = read.reuses[i]) {
      const size_t anchor = size_t(reuse->anchor);
      const Shape& shape = read.layers[i].projections.shape;
      std::vector<int64_t>& bytes = read.shared_value_bytes[anchor];
      bytes.resize(size_t(shape.kv_heads) * read.value_sets[anchor], 0);
      for (size_t head = 0; head < reuse->value_sets.size(); head++)
        bytes[size_t(reuse->head_map[head]) * read.value_sets[anchor] + size_t(reuse->value_sets[head])] =
            kv_parts_of(read.rests[i].rules.of(int64_t(head)), shape).value.bytes;
    }
}

// Reads the gates of layers whose rules select: weight and bias of each, with no numbers of a layer without.
std::vector<Gate> gates_of(const Tensors& given, const Layers& read, const char* op) {
  const size_t count = read.layers.size();
  std::vector<Gate> found(count);
  REQUIRE(given.empty() || given.size() == 2 * count, op, ": ", given.size(), " parts of gates for ", count, " layers");
  for (size_t i = 0; i < count; i++) {
    const Shape& shape = read.layers[i].projections.shape;
    found[i] = {nullptr, nullptr, 0, 0};
    if (!any_selects(read.rests[i].rules)) continue;
    REQUIRE(!given.empty() && !read.reuses[i], op, ": layer ", i, " keeps tokens by their score, and has no gate for that");
    found[i] = {dense(given[2 * i], {shape.kv_heads, read.inputs}, read.type, op, "a gate"),
                dense(given[2 * i + 1], {shape.kv_heads}, read.type, op, "a gate's bias"), shape.kv_heads, read.inputs};
  }
  return found;
}

int64_t read_layers_op(Tensors weights, Tensors biases, Shapes kinds, Tensors centres, Tensors norms, double eps, int64_t head_dim, Tensors rules, double scaling,
                       Tensor shares, Tensors gates) {
  const char* op = "read_layers";
  const size_t count = rules.size();
  REQUIRE(count && weights.size() == 7 * count && norms.size() == 2 * count && centres.size() == count &&
              (biases.empty() || biases.size() == 3 * count),
          op, ": ", weights.size(), " weights, ", biases.size(), " biases, ", norms.size(), " norms and ", centres.size(), " centres for ",
          count, " layers with rules; 7, 3 or none, 2 and 1 of each are needed");
  check(norms[0], {-1}, norms[0].scalar_type(), op, "a norm");
  const std::vector<WeightKind> all_kinds = kinds_of(kinds, weights.size(), op);
  Layers read;
  read.type = norms[0].scalar_type();
  read.inputs = norms[0].size(0);
  read.reuses = reuses_of(shares, count, rules[0].dim() == 2 ? rules[0].size(1) : 0, op);
  for (size_t i = 0; i < count; i++) {
    check(rules[i], {RULE_NUMBERS, -1}, ScalarType::Long, op, "the table of rules");
    const auto& reuse = read.reuses[i];
    const Shape* anchor = reuse ? &read.layers[size_t(reuse->anchor)].projections.shape : nullptr;
    const Shape like = anchor ? *anchor : Shape{};  // `layers` may move
    read.layers.emplace_back(&weights[7 * i], biases.empty() ? nullptr : &biases[3 * i], &norms[2 * i], eps, read.inputs,
                             rules[i].size(1), head_dim, read.type, dtype_of(norms[0], op, "a norm"), op, &all_kinds[7 * i], anchor ? &like : nullptr);
    if (!anchor) read.layers.back().projections.take_centre(centres[i], op);
    const Shape& shape = read.layers.back().projections.shape;
    read.rests.push_back(rest_of(rules[i], scaling, 0.0, std::nullopt, shape, op));
  }
  count_shared_values(read);
  read.gates = gates_of(gates, read, op);
  for (const Tensors* some : {&weights, &biases, &centres, &norms, &rules, &gates}) append(read.held, *some);
  for (size_t i = 0; i < read.held.size(); i++) read.memory.push_back(read.memory_of(i));
  return all_layers().add(std::move(read));
}

// Table, lengths, runs and refs of a cache, then the table of what gates select and how many tokens have left, of no numbers where no
// rule selects.
constexpr size_t STATE_PARTS = 6;

std::pair<LayerCache, Tensors> cache_of(const Layers& layers, int64_t rows, size_t layer, const Tensors& keys, const Tensors& values,
                                        const Tensors& shared_values, const Tensor* state, int64_t lag, const char* op) {
  Shape shape = layers.layers[layer].projections.shape;
  shape.rows = rows;
  Tensors held(state, state + STATE_PARTS);
  append(held, keys);
  append(held, values);
  append(held, shared_values);
  LayerCache cache(keys, values, state[0], state[1], state[2], state[3], layers.rests[layer], lag, shape, layers.type, op);
  const size_t value_sets = layers.value_sets[layer], segments = keys.size();
  if (layers.gates[layer].heads) {
    REQUIRE(value_sets == 0, op, ": layer ", layer, " keeps tokens by their score and serves layers that share its keys");
    put_selected(cache, shape, shared_values, state[4], state[5], op);
    return {std::move(cache), held};
  }
  REQUIRE(shared_values.size() == value_sets * segments, op, ": ", shared_values.size(), " segments of values beside those of layer ", layer,
          ", of ", value_sets, " value sets");
  for (size_t value_set = 0; value_set < value_sets; value_set++) {
    const auto begin = shared_values.begin() + int64_t(value_set * segments);
    cache.shared_values.emplace_back(Tensors(begin, begin + int64_t(segments)), shape.value_dim, layers.type, op, "values beside others", true);
    REQUIRE(cache.shared_values.back().first_block.back() == cache.blocks, op, ": ", cache.shared_values.back().first_block.back(),
            " blocks beside ", cache.blocks);
  }
  for (const PoolViews& views : cache.shared_values) cache.value_sets.push_back(views.view());
  cache.shared_value_bytes = layers.shared_value_bytes[layer];
  return {std::move(cache), held};
}

int64_t read_caches_op(int64_t layers, Tensors keys, Tensors values, Shapes segments, Tensors shared_values, Tensors states, int64_t lag) {
  const char* op = "read_caches";
  const std::shared_ptr<const Layers> of = all_layers().find(layers, op, "layers");
  const size_t count = of->layers.size();
  size_t own_caches = 0;
  for (const auto& reuse : of->reuses) own_caches += !reuse;
  REQUIRE(segments.size() == count && states.size() == STATE_PARTS * own_caches, op, ": ", segments.size(), " numbers of segments and ",
          states.size(), " parts of caches for ", count, " layers, ", own_caches, " of them with caches; 1 and ", STATE_PARTS, " of each are needed");
  check(states[1], {-1}, ScalarType::Long, op, "lengths");
  Caches read = {of, states[1].size(0), {}, std::vector<Scratch>(count)};
  int64_t begin = 0;
  size_t state = 0, begin_shared_values = 0;
  for (size_t i = 0; i < count; i++) {
    const int64_t own = segments[i];
    if (of->reuses[i]) {
      REQUIRE(own == 0, op, ": ", own, " segments of layer ", i, ", whose values lie in those of another");
      read.caches.emplace_back(std::nullopt);
      continue;
    }
    REQUIRE(own > 0 && own <= int64_t(keys.size()) - begin && own <= int64_t(values.size()) - begin, op, ": ", own,
            " segments of layer ", i, ", of ", keys.size(), " of keys and ", values.size(), " of values");
    const auto part = [&](const Tensors& all) { return Tensors(all.begin() + begin, all.begin() + begin + own); };
    const size_t more = (of->gates[i].heads ? 1 : of->value_sets[i]) * size_t(own);
    REQUIRE(more <= shared_values.size() - begin_shared_values, op, ": ", shared_values.size(), " segments beside others; more are needed");
    const auto first = shared_values.begin() + int64_t(begin_shared_values);
    read.caches.emplace_back(cache_of(*of, read.rows, i, part(keys), part(values), Tensors(first, first + int64_t(more)),
                                      &states[STATE_PARTS * state++], lag, op));
    begin += own;
    begin_shared_values += more;
  }
  REQUIRE(size_t(begin) == keys.size() && keys.size() == values.size(), op, ": ", begin, " segments of the layers, ",
          keys.size(), " of keys and ", values.size(), " of values");
  return all_caches().add(std::move(read));
}

std::shared_ptr<const Layers> layers_of(const Caches& caches, const char* op) {
  std::shared_ptr<const Layers> found = caches.layers.lock();
  REQUIRE(found, op, ": the layers that these caches are of are gone");
  return found;
}

// Reads the cache of one layer again.
void read_cache_op(int64_t caches, int64_t layer, Tensors keys, Tensors values, Tensors shared_values, Tensors state, int64_t lag) {
  const char* op = "read_cache";
  const std::shared_ptr<Caches> all = all_caches().find(caches, op, "caches");
  REQUIRE(layer >= 0 && size_t(layer) < all->caches.size() && state.size() == STATE_PARTS, op, ": layer ", layer,
          " of ", all->caches.size(), " with ", state.size(), " parts of a cache, of ", STATE_PARTS);
  REQUIRE(all->caches[size_t(layer)], op, ": layer ", layer, " has no cache of its own");
  all->caches[size_t(layer)].emplace(
      cache_of(*layers_of(*all, op), all->rows, size_t(layer), keys, values, shared_values, state.data(), lag, op));
}

// The layers from `first` on, one after the other. Returns what came out of the last one that was done, the number of layers done,
// and what the next one wants; -1 where the weights are no more what was read.
std::tuple<Tensor, int64_t, int64_t> step_layers_op(Tensor x, Tensor cos, Tensor sin, int64_t caches, int64_t first) {
  const char* op = "step_layers";
  const TracedStep traced(REST);
  const std::shared_ptr<Caches> all = all_caches().find(caches, op, "caches");
  const std::shared_ptr<const Layers> layers = layers_of(*all, op);
  const Layers& read = *layers;
  const int64_t rows = all->rows, count = int64_t(read.layers.size());
  x = one_token(x, op);
  check(x, {rows, 1, read.inputs}, read.type, op, "the input");
  REQUIRE(first >= 0 && first < count, op, ": the first layer is ", first, " of ", count);
  const Rotary rotary(cos, sin, rows, read.layers[0].projections.shape.head_dim, read.type, op);
  Tensor out[] = {new_tensor(x, Shapes{rows, 1, read.inputs}),
                  new_tensor(x, Shapes{rows, 1, read.inputs})};  // written in turn
  if (!read.same()) return {out[0], first, -1};
  const void* from = x.const_data_ptr();
  Scratch memory;
  std::vector<int16_t> scores;
  for (int64_t i = first; i < count; i++) {
    Tensor& to = out[i % 2];
    const auto& reuse = read.reuses[size_t(i)];
    const auto attend = [&](const Token& token, void* mixed) {
      const Gate& gate = read.gates[size_t(i)];
      enter(GATES);
      scores.resize(size_t(rows * gate.heads));
      if (gate.heads) gate.score(token.hidden, token.shape.dtype, rows, scores.data());
      if (!reuse)
        return take(all->caches[size_t(i)]->first, token, mixed, op, read.value_sets[size_t(i)] ? &all->kept[size_t(i)] : nullptr, scores.data());
      const size_t anchor = size_t(reuse->anchor);
      return take_shared(all->caches[anchor]->first, *reuse, read.rests[size_t(i)], token, all->kept[anchor], mixed, op);
    };
    const int64_t wanted = read.layers[size_t(i)].step(attend, rotary, rows, from, to.mutable_data_ptr(), memory, op);
    if (wanted) return {out[(i + 1) % 2], i, wanted};
    from = to.const_data_ptr();
  }
  return {out[(count + 1) % 2], count, 0};
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Lets go of what `read_layers` and `read_caches` returned a number for; one that is not there is no error.
EXPORT void moacompress_forget_layers(int64_t number) { all_layers().forget(number); }
EXPORT void moacompress_forget_caches(int64_t number) { all_caches().forget(number); }

static const moacompress::Operators operators("moacompress_cpu", {
    {"read_layers(Tensor[] weights, Tensor[] biases, int[] kinds, Tensor[] centres, Tensor[] norms, float eps, int head_dim, Tensor[] rules, float scaling, "
     "Tensor shares, Tensor[] gates) -> int",
     Boxed<&read_layers_op>::call},
    {"read_caches(int layers, Tensor[] keys, Tensor[] values, int[] segments, Tensor[] shared_values, Tensor[] states, int lag) -> int",
     Boxed<&read_caches_op>::call},
    {"read_cache(int caches, int layer, Tensor[] keys, Tensor[] values, Tensor[] shared_values, Tensor[] state, int lag) -> ()",
     Boxed<&read_cache_op>::call},
    {"step_layers(Tensor x, Tensor cos, Tensor sin, int caches, int first) -> (Tensor, SymInt, SymInt)",
     Boxed<&step_layers_op>::call},
});
