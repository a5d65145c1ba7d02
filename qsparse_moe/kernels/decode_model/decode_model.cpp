// One decode step of a whole model on a CPU: the logits after the next token of each of B sequences. Only the weight rows
// behind selected features are read. The reference is the training model's own forward pass with a key-value cache
// (inference/cached_model.py); tests compare the two.
//
// One parallel region spans the step. A product is divided among the threads by rows, so that a thread reads whole rows; the
// sums of all threads are then added, divided by columns. The work between products (norms, selections, attention, routing)
// is divided by tokens, heads or experts. A barrier separates the phases. Buffers are allocated at the first step with a
// number of tokens and reused by later ones.
//
// B tokens, D width, E experts, A experts per token, F hidden features of an expert.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <omp.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <atomic>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "row_dot.h"
#include "site.h"

namespace {

using namespace qsparse_moe;
using c10::intrusive_ptr;

int64_t padded(int64_t columns) { return (columns + kTernaryBlock - 1) / kTernaryBlock * kTernaryBlock; }

const float* floats(const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr; }

// A matrix, or a stack of E, as it is stored.
struct StoredMatrix : torch::CustomClassHolder {
  // `data`: (E * D, row_bytes) uint8 rows; `scales`: fp32, one per row (int8), one per matrix (ternary), or none.
  // `whole_bytes`: of one matrix with all features, if `data` has only those that all tokens share.
  StoredMatrix(at::Tensor data_, int64_t format_, int64_t num_rows_, int64_t num_columns_, at::Tensor scales_,
               int64_t whole_bytes_)
      : data(std::move(data_)),
        scales(std::move(scales_)),
        format(NumberFormat(format_)),
        num_rows(num_rows_),
        num_columns(num_columns_),
        whole_bytes(whole_bytes_) {
    TORCH_CHECK(data.dim() == 2 && data.is_contiguous() && data.scalar_type() == at::kByte,
                "a stored matrix must be contiguous rows of bytes");
    TORCH_CHECK(format_ >= 0 && format_ <= 3 && num_rows > 0 && data.size(0) % num_rows == 0,
                "a stored matrix must have a known format and whole matrices");
    const int64_t grain = format == NumberFormat::ternary ? kTernaryBlock : format == NumberFormat::int8 ? 2 * kStoredUnit : kStoredUnit;
    stored_columns = (num_columns + grain - 1) / grain * grain;
    const int64_t bits = format == NumberFormat::fp32 ? 32 : format == NumberFormat::bf16 ? 16
                         : format == NumberFormat::int8 ? 8 : 2;
    TORCH_CHECK(data.size(1) * 8 == stored_columns * bits, "a stored row must be padded to ", grain, " columns");
    const int64_t wanted = format == NumberFormat::int8 ? data.size(0)
                           : format == NumberFormat::ternary ? data.size(0) / num_rows : 0;
    TORCH_CHECK(scales.numel() == wanted && scales.scalar_type() == at::kFloat && scales.is_contiguous(),
                "a stored matrix must have ", wanted, " scales in fp32");
    data.data_ptr<uint8_t>();
  }

  Matrix matrix(int64_t which) const {
    Matrix view;
    view.data = reinterpret_cast<const char*>(data.const_data_ptr<uint8_t>()) + which * num_rows * data.size(1);
    view.format = format;
    view.num_columns = stored_columns;
    view.row_bytes = data.size(1);
    return view;
  }
  const float* row_scales(int64_t which) const {
    return format == NumberFormat::int8 ? scales.const_data_ptr<float>() + which * num_rows : nullptr;
  }
  float factor(int64_t which) const {
    return format == NumberFormat::ternary ? scales.const_data_ptr<float>()[which] : 1.0f;
  }

  at::Tensor data, scales;
  NumberFormat format;
  int64_t num_rows, num_columns, whole_bytes, stored_columns;
};

struct SiteHolder : torch::CustomClassHolder {
  SiteHolder(int64_t num_features, int64_t selection, int64_t format, int64_t rescale, int64_t group_size,
             std::vector<int64_t> num_selected, std::vector<double> thresholds, std::vector<int64_t> features,
             bool selects_all) {
    settings.num_features = num_features;
    settings.selection = Selection(selection);
    settings.format = RowFormat(format);
    settings.rescale = Rescale(rescale);
    settings.group_size = group_size;
    settings.num_selected = std::move(num_selected);
    settings.thresholds.assign(thresholds.begin(), thresholds.end());
    settings.features.assign(features.begin(), features.end());
    settings.selects_all = selects_all;
    TORCH_CHECK(settings.num_selected.size() == settings.thresholds.size() && !settings.num_selected.empty(),
                "a site must have as many thresholds as numbers of selected features");
    if (settings.selection != Selection::shared || selects_all) return;
    TORCH_CHECK(settings.features.size() % settings.num_selected.size() == 0,
                "a site with shared features must list as many for every expert");
    for (const int64_t count : settings.num_selected)
      TORCH_CHECK(count <= settings.listed_features(), "a site with shared features must list all that are selected");
    for (const int32_t feature : settings.features)
      TORCH_CHECK(feature >= 0 && feature < num_features, "a shared feature must be one of the site");
  }
  SiteSettings settings;
};

struct FeedForwardHolder : torch::CustomClassHolder {
  FeedForwardHolder(std::optional<intrusive_ptr<StoredMatrix>> gate_, intrusive_ptr<StoredMatrix> up_,
                    intrusive_ptr<StoredMatrix> down_, intrusive_ptr<SiteHolder> input_, intrusive_ptr<SiteHolder> hidden_,
                    bool gate_first_)
      : gate(gate_ ? *gate_ : nullptr), up(up_), down(down_), input(input_), hidden(hidden_), gate_first(gate_first_) {
    TORCH_CHECK(!gate_first || (gate && up->format == gate->format && up->num_columns == gate->num_rows &&
                                up->num_rows == gate->num_columns &&
                                (up->format == NumberFormat::fp32 || up->format == NumberFormat::bf16)),
                "a feed-forward part with the gate first must have a gate, and an up matrix in fp32 or bf16 that is stored "
                "output-major");
  }
  // Hidden features, padded.
  int64_t hidden_columns() const { return gate_first ? gate->stored_columns : up->stored_columns; }
  intrusive_ptr<StoredMatrix> gate, up, down;
  intrusive_ptr<SiteHolder> input, hidden;
  // Gate is computed before up, and up only for the hidden features whose gate is positive: `up` is stored output-major.
  bool gate_first;
};

// In place of an expert: a choice that its token does not use.
constexpr int64_t kUnused = -1;

// Weights of the experts of a token that uses fewer than the router chooses: as of a router that chooses fewer, those of
// all choices, or these scaled to the sum of all.
enum class FewerWeights { kRouter = 0, kKept = 1, kRenormalized = 2 };

struct RouterHolder : torch::CustomClassHolder {
  RouterHolder(at::Tensor weight_, at::Tensor bias_, int64_t experts_per_token_, int64_t weighed_, double top_p_,
               int64_t fewer_weights_, bool sigmoid_, bool softmax_of_chosen_, bool renormalized_, double scaling_,
               int64_t num_groups_, int64_t groups_per_token_, bool group_by_two_, bool reads_sparse_)
      : weight(std::move(weight_)),
        bias(std::move(bias_)),
        experts_per_token(experts_per_token_),
        weighed(weighed_),
        top_p(top_p_),
        fewer_weights(FewerWeights(fewer_weights_)),
        sigmoid(sigmoid_),
        softmax_of_chosen(softmax_of_chosen_),
        renormalized(renormalized_),
        scaling(float(scaling_)),
        num_groups(num_groups_),
        groups_per_token(groups_per_token_),
        group_by_two(group_by_two_),
        reads_sparse(reads_sparse_) {}
  int64_t num_experts() const { return weight.size(0); }
  at::Tensor weight, bias;  // (E, D) and (E), fp32; no bias: empty
  // The most experts that a token uses, and how many of its choices have weights, from which those of fewer follow.
  int64_t experts_per_token, weighed;
  double top_p;  // a token uses the fewest first choices that reach this share of all weights; 1: all of them
  FewerWeights fewer_weights;
  bool sigmoid, softmax_of_chosen, renormalized;
  float scaling;
  int64_t num_groups, groups_per_token;
  bool group_by_two, reads_sparse;
};

struct Layer {
  at::Tensor attention_norm, feed_forward_norm;
  at::Tensor query_norm, key_norm;  // (C), or (H * C) for all heads together; empty without norms
  at::Tensor qkv_bias, output_bias;
  intrusive_ptr<StoredMatrix> qkv, output;  // qkv: with latent attention, the projection to the ranks
  // With latent attention, fp32, one row per output; the first two are empty without a rank of queries.
  at::Tensor query_latent_norm, query_up, latent_norm, latent_up;
  intrusive_ptr<SiteHolder> attention_input, attention_output;
  intrusive_ptr<RouterHolder> router;
  intrusive_ptr<FeedForwardHolder> routed, dense;  // dense: the shared experts beside `routed`, or the whole layer
  at::Tensor token_gate;
};

// The sizes of multi-head latent attention; with ordinary attention all are 0. Its rotated channels are those of a head of
// the model, and its cache has one key per token: the latent vector and the rotated key.
struct LatentSizes {
  int64_t queries = 0, rank = 0, plain = 0, rotated = 0, value = 0;  // queries: their rank, or 0
  float scale = 0, epsilon = 0;
  int64_t query_size() const { return plain + rotated; }
  int64_t cached() const { return rank + rotated; }
};

// A barrier for the threads of one region. They spin, because a step has about a hundred barriers a few microseconds apart,
// and yield after a while, because the thread that they wait for may not be running.
class Barrier {
 public:
  explicit Barrier(int num_threads) : num_threads_(num_threads) {}
  void wait() {
    if (num_threads_ == 1) return;
    const int64_t round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins > 20000) std::this_thread::yield();
      else __builtin_ia32_pause();
    }
  }

 private:
  const int num_threads_;
  std::atomic<int> arrived_{0};
  std::atomic<int64_t> round_{0};
};

// A product of up to 8 tokens with one matrix: the rows that at least one of them needs.
struct Job {
  Matrix matrix;
  int tokens = 1;
  const int32_t* rows = nullptr;
  const float* values = nullptr;  // (num_rows, tokens)
  bool has_steps = false;         // whether `steps` are those of the values, as in ChosenRows
  float steps[kMaxTokens] = {};
  int64_t num_rows = 0;
  bool reads_unneeded = false;
  int used_tokens = 1;
  bool accumulates = false;  // adds to `out`, which is set otherwise
  float* out[kMaxTokens] = {};
  std::vector<int32_t> row_buffer;
  std::vector<float> value_buffer;
};

// The up projection of up to 8 tokens of one expert, for the hidden features whose gate is positive in one of them.
struct UpJob {
  Matrix matrix;
  int64_t units = 0;
  int tokens = 1;
  int64_t num_rows = 0;
  std::vector<int32_t> rows;
  std::vector<float> first, second, dense;  // the tokens as DotTokens, and one of them before that
  float* out[kMaxTokens] = {};
};

// Memory for the feature lists of a given number of rows.
class ListBuffer {
 public:
  void reserve(int64_t num_rows, int64_t num_features) {
    const int64_t width = num_features + 2 * kLanes;
    if (num_rows <= int64_t(lists.size()) && width <= width_) return;
    width_ = std::max(width, width_);
    const int64_t count = std::max(num_rows, int64_t(lists.size()));
    features_.resize(count * width_);
    values_.resize(count * width_);
    lists.resize(count);
    for (int64_t i = 0; i < count; ++i) lists[i] = {features_.data() + i * width_, values_.data() + i * width_, 0, 0};
  }
  std::vector<FeatureList> lists;

 private:
  int64_t width_ = 0;
  std::vector<int32_t> features_;
  std::vector<float> values_;
};

// Rows of fp32, each padded to whole blocks of columns so that a product may write past the last column.
class Rows {
 public:
  void reserve(int64_t num_rows, int64_t columns) {
    stride_ = std::max(stride_, padded(columns));
    if (int64_t(values_.size()) < num_rows * stride_) values_.assign(num_rows * stride_, 0.0f);
  }
  float* operator[](int64_t row) { return values_.data() + row * stride_; }
  int64_t stride() const { return stride_; }

 private:
  int64_t stride_ = 0;
  std::vector<float> values_;
};

class DecodeModel : public torch::CustomClassHolder {
 public:
  DecodeModel(int64_t num_heads, int64_t num_kv_heads, int64_t head_size, double epsilon, int64_t activation,
              at::Tensor inverse_frequencies, double rotation_factor, at::Tensor final_norm, at::Tensor embedding,
              intrusive_ptr<StoredMatrix> head)
      : num_heads_(num_heads),
        num_kv_heads_(num_kv_heads),
        head_size_(head_size),
        width_(final_norm.size(0)),
        epsilon_(float(epsilon)),
        activation_(Activation(activation)),
        rotation_factor_(float(rotation_factor)),
        inverse_frequencies_(std::move(inverse_frequencies)),
        final_norm_(std::move(final_norm)),
        embedding_(std::move(embedding)),
        head_(std::move(head)) {
    const at::ScalarType type = embedding_.scalar_type();
    TORCH_CHECK(embedding_.dim() == 2 && embedding_.is_contiguous() && embedding_.size(1) == width_ &&
                    (type == at::kFloat || type == at::kBFloat16),
                "an embedding must be contiguous (V, D) in fp32 or bf16");
  }

  void add_layer(at::Tensor attention_norm, at::Tensor feed_forward_norm, at::Tensor query_norm, at::Tensor key_norm,
                 intrusive_ptr<StoredMatrix> qkv, intrusive_ptr<StoredMatrix> output, at::Tensor qkv_bias,
                 at::Tensor output_bias, intrusive_ptr<SiteHolder> input_site, intrusive_ptr<SiteHolder> output_site,
                 std::optional<intrusive_ptr<RouterHolder>> router,
                 std::optional<intrusive_ptr<FeedForwardHolder>> routed,
                 std::optional<intrusive_ptr<FeedForwardHolder>> dense, at::Tensor token_gate) {
    Layer layer;
    layer.attention_norm = attention_norm, layer.feed_forward_norm = feed_forward_norm;
    layer.query_norm = query_norm, layer.key_norm = key_norm;
    layer.qkv_bias = qkv_bias, layer.output_bias = output_bias;
    layer.qkv = qkv, layer.output = output;
    layer.attention_input = input_site, layer.attention_output = output_site;
    if (router) layer.router = *router;
    if (routed) layer.routed = *routed;
    if (dense) layer.dense = *dense;
    layer.token_gate = token_gate;
    layers_.push_back(std::move(layer));
  }

  // Called once, before the layers are added. The number of key-value heads is then 1 and the size of a head that of its
  // rotated channels.
  void use_latent_attention(int64_t query_rank, int64_t rank, int64_t plain, int64_t value, double scale,
                            double epsilon) {
    latent_ = {query_rank, rank, plain, head_size_, value, float(scale), float(epsilon)};
  }

  // The inner norms and matrices of the layer that was added last.
  void add_latent_maps(at::Tensor query_latent_norm, at::Tensor query_up, at::Tensor latent_norm, at::Tensor latent_up) {
    Layer& layer = layers_.back();
    const int64_t queries = latent_.queries ? num_heads_ * latent_.query_size() * latent_.queries : 0;
    TORCH_CHECK(query_latent_norm.numel() == latent_.queries && query_up.numel() == queries &&
                    latent_norm.numel() == latent_.rank &&
                    latent_up.numel() == num_heads_ * (latent_.plain + latent_.value) * latent_.rank,
                "decode: the inner norms and matrices must have the sizes of latent attention");
    layer.query_latent_norm = query_latent_norm, layer.query_up = query_up;
    layer.latent_norm = latent_norm, layer.latent_up = latent_up;
  }

  // From the next step on, read all rows of a matrix, zeros included, if the tokens of a pass need at least this share of
  // them; the entries are for 1, 2, 4 and 8 tokens. With 0 all rows are always read, with more than 1 never.
  void read_all_rows_from(std::vector<double> shares) {
    TORCH_CHECK(shares.size() == 4, "decode: there must be one share for 1, 2, 4 and 8 tokens");
    all_rows_from_.assign(shares.begin(), shares.end());
  }

  // From the next step on, multiply codes as integers (the default), or in fp32: slower, and without rounding of features.
  void multiply_by_integers(bool by_integers) { by_integers_ = by_integers; }

  // Bytes of stored weights that the last step read, and that it would have read if no feature were zero; number of passes
  // over a matrix, and number of passes that read all rows although some were not needed.
  std::vector<int64_t> last_step() const { return {bytes_read_, bytes_dense_, passes_, whole_passes_}; }

  at::Tensor step(const at::Tensor& tokens, const at::Tensor& positions, at::Tensor keys, at::Tensor values);

 private:
  struct Thread {
    int index, count;
    Barrier& barrier;
    SiteScratch& scratch;
    std::vector<float>& scores;   // as many as slots of the cache, or experts
    std::vector<int32_t>& marks;  // one per feature, 0 between two uses
    bool takes(int64_t item) const { return item % count == index; }
  };

  void reserve(int num_threads);
  void embed(int64_t id, float* to) const;
  void run_layer(const Layer& layer, int64_t number, const Thread& thread);
  void attend(const Layer& layer, int64_t number, const Thread& thread);
  void finish_qkv(const Layer& layer, const Thread& thread);
  void attend_group(const Layer& layer, int64_t number, int64_t token, int64_t group, std::vector<float>& scores);
  void store_latents(const Layer& layer, int64_t number, const Thread& thread);
  void attend_latent_head(const Layer& layer, int64_t number, int64_t token, int64_t head, const Thread& thread);
  int64_t qkv_columns() const {
    if (!latent_.rank) return (num_heads_ + 2 * num_kv_heads_) * head_size_;
    return (latent_.queries ? latent_.queries : num_heads_ * latent_.query_size()) + latent_.cached();
  }
  void feed_forward(const Layer& layer, const Thread& thread);
  void route(const Layer& layer, const Thread& thread);
  void choose_experts(const RouterHolder& router, int64_t token, std::vector<float>& scores);
  void plan_experts(const Layer& layer);
  void project(const StoredMatrix& matrix, const ListBuffer& lists, Rows& out, bool accumulates, const Thread& thread);
  void build_expert_jobs(const Layer& layer, const Thread& thread);
  void build_up_job(UpJob& job, const FeedForwardHolder& part, int64_t expert, int tokens,
                    const FeatureList* const* lists, float* const* gates, float* const* ups);
  void run_up_jobs(const Layer& layer, const Thread& thread);
  void build_down_jobs(const Layer& layer, const Thread& thread);
  template <typename Visit>
  void for_expert_groups(const Layer& layer, const Visit& visit);
  float* partial_sums(int thread, int64_t job, int token) {
    return partial_sums_[thread].data() + (job * sum_tokens_ + token) * sum_columns_;
  }
  int64_t num_token_groups() const { return (batch_ + kMaxTokens - 1) / kMaxTokens; }
  void build_job(Job& job, const StoredMatrix& matrix, int64_t which, int tokens, const FeatureList* const* lists,
                 const float* factors, float* const* out, bool accumulates, const Thread& thread);
  void run_jobs(const Thread& thread, int64_t num_jobs);
  void head(const Thread& thread, at::Tensor& logits);

  const int64_t num_heads_, num_kv_heads_, head_size_, width_;
  const float epsilon_;
  const Activation activation_;
  const float rotation_factor_;
  const at::Tensor inverse_frequencies_, final_norm_, embedding_;
  const intrusive_ptr<StoredMatrix> head_;
  std::vector<Layer> layers_;
  LatentSizes latent_;
  bool by_integers_ = true;
  std::vector<double> all_rows_from_ = {2, 2, 2, 2};
  int64_t bytes_read_ = 0, bytes_dense_ = 0, passes_ = 0, whole_passes_ = 0;

  // Buffers of one step.
  int64_t batch_ = 0;
  const int64_t* positions_ = nullptr;
  float *keys_ = nullptr, *values_ = nullptr;
  int64_t capacity_ = 0, cache_stride_layer_ = 0, cache_stride_batch_ = 0, cache_stride_head_ = 0;
  Rows stream_, normed_, qkv_, mixed_, logits_, gate_, up_, dense_gate_, dense_up_, spare_, router_rows_;
  ListBuffer lists_, dense_lists_, hidden_lists_, dense_hidden_lists_;
  std::vector<int64_t> chosen_;     // (B, A)
  std::vector<float> weights_;      // (B, A)
  std::vector<float> token_share_;  // (B)
  std::vector<float> rotations_;    // (B, C): cosines, then sines
  std::vector<Job> jobs_;
  std::vector<UpJob> up_jobs_;
  // Sums of the rows of each thread: (job, token, column), so that no thread waits for another to add.
  std::vector<std::vector<float>> partial_sums_;
  int64_t sum_columns_ = 0, sum_tokens_ = 0;
  std::vector<std::vector<int32_t>> marks_;
  std::vector<std::unique_ptr<SiteScratch>> scratch_;
  std::vector<float> head_first_, head_second_;
  std::vector<std::vector<float>> scores_;
  std::vector<std::vector<float>> latent_rows_;  // by thread: a query, the same as a latent one, and a mixed latent vector
  // The tokens of every expert in use, at most 8 at a time: (expert, first place, number) into `members_`.
  struct ExpertTokens {
    int64_t expert, begin, count;
  };
  std::vector<ExpertTokens> expert_tokens_;
  std::vector<int64_t> members_;  // places b * A + a, sorted by expert
  std::vector<int32_t> every_row_;
};

// Allocate the buffers for the tokens and threads of this step; later steps of the same size reuse them.
void DecodeModel::reserve(int num_threads) {
  int64_t widest = width_, choices = 1, experts = 1, hidden = 1, dense_hidden = 1;
  for (const Layer& layer : layers_) {
    widest = std::max(widest, layer.attention_output->settings.num_features);
    if (layer.routed) {
      choices = std::max(choices, layer.router->experts_per_token);
      experts = std::max(experts, layer.router->num_experts());
      hidden = std::max(hidden, layer.routed->hidden->settings.num_features);
    }
    if (layer.dense) dense_hidden = std::max(dense_hidden, layer.dense->hidden->settings.num_features);
  }
  widest = std::max({widest, hidden, dense_hidden});
  const int64_t places = batch_ * choices, units = padded(width_) / kUnit;
  for (Rows* rows : {&stream_, &normed_, &router_rows_}) rows->reserve(batch_, width_);
  qkv_.reserve(batch_, qkv_columns());
  mixed_.reserve(batch_, num_heads_ * (latent_.rank ? latent_.value : head_size_));
  logits_.reserve(batch_, experts);
  for (Rows* rows : {&gate_, &up_}) rows->reserve(places, hidden);
  for (Rows* rows : {&dense_gate_, &dense_up_}) rows->reserve(batch_, dense_hidden);
  spare_.reserve(1, std::max({head_->num_rows, hidden, dense_hidden}));
  lists_.reserve(places, widest);
  dense_lists_.reserve(batch_, width_);
  hidden_lists_.reserve(places, hidden);
  dense_hidden_lists_.reserve(batch_, dense_hidden);
  if (int64_t(chosen_.size()) < places) {
    chosen_.resize(places), weights_.resize(places), members_.resize(places), token_share_.resize(batch_);
    rotations_.resize(batch_ * head_size_);
    expert_tokens_.reserve(places + experts);
    // Gate and up of every group of an expert's tokens, and of every group of tokens of the shared experts.
    jobs_.resize(2 * (places + num_token_groups()) + 2);
    up_jobs_.resize(places + num_token_groups());
    head_first_.assign(num_token_groups() * kMaxTokens * units * kLanes, 0.0f);
    head_second_.assign(head_first_.size(), 0.0f);
  }
  sum_tokens_ = padded_tokens(int(std::min<int64_t>(batch_, kMaxTokens)));
  sum_columns_ = padded(std::max({widest, width_, qkv_columns()}));
  if (int(partial_sums_.size()) < num_threads) partial_sums_.resize(num_threads);
  for (std::vector<float>& sums : partial_sums_)
    if (int64_t(sums.size()) < int64_t(jobs_.size()) * sum_tokens_ * sum_columns_)
      sums.resize(jobs_.size() * sum_tokens_ * sum_columns_);
  while (int(scratch_.size()) < num_threads) {
    scratch_.push_back(std::make_unique<SiteScratch>(widest));
    marks_.emplace_back(widest, 0);
    scores_.emplace_back();
    latent_rows_.emplace_back(latent_.query_size() + 2 * latent_.cached());
  }
  for (std::vector<float>& scores : scores_)
    // Two per expert: the scores of its groups, of which there are not more than experts, follow them.
    if (int64_t(scores.size()) < std::max(capacity_, 2 * experts) + kLanes)
      scores.resize(std::max(capacity_, 2 * experts) + kLanes);
  if (int64_t(every_row_.size()) < widest) {
    every_row_.resize(widest);
    for (int64_t i = 0; i < widest; ++i) every_row_[i] = int32_t(i);
  }
}

at::Tensor DecodeModel::step(const at::Tensor& tokens, const at::Tensor& positions, at::Tensor keys, at::Tensor values) {
  TORCH_CHECK(tokens.dim() == 1 && tokens.scalar_type() == at::kLong && tokens.is_contiguous() &&
                  positions.sizes() == tokens.sizes() && positions.scalar_type() == at::kLong &&
                  positions.is_contiguous(),
              "decode: tokens and positions must be contiguous int64 (B)");
  const int64_t channels = latent_.rank ? latent_.cached() : head_size_;
  TORCH_CHECK(keys.dim() == 5 && keys.scalar_type() == at::kFloat && values.scalar_type() == at::kFloat &&
                  (latent_.rank ? values.size(4) == 0
                                : keys.sizes() == values.sizes() && keys.strides() == values.strides()) &&
                  keys.stride(4) == 1 && keys.stride(3) == channels && keys.size(0) == int64_t(layers_.size()) &&
                  keys.size(1) == tokens.size(0) && keys.size(2) == num_kv_heads_ && keys.size(4) == channels,
              "decode: keys and values must be fp32 (L, B, H, P, C) of this model, the last two dims contiguous");
  batch_ = tokens.size(0);
  positions_ = positions.const_data_ptr<int64_t>();
  keys_ = keys.data_ptr<float>(), values_ = values.data_ptr<float>();
  capacity_ = keys.size(3);
  cache_stride_layer_ = keys.stride(0), cache_stride_batch_ = keys.stride(1), cache_stride_head_ = keys.stride(2);
  const int num_threads = at::get_num_threads();
  reserve(num_threads);
  bytes_read_ = bytes_dense_ = passes_ = whole_passes_ = 0;
  for (int64_t token = 0; token < batch_; ++token) embed(tokens.const_data_ptr<int64_t>()[token], stream_[token]);
  // The angles are the same in every layer.
  for (int64_t token = 0; token < batch_; ++token)
    for (int64_t i = 0, half = head_size_ / 2; i < half; ++i) {
      const float angle = float(positions_[token]) * floats(inverse_frequencies_)[i];
      rotations_[token * head_size_ + i] = std::cos(angle) * rotation_factor_;
      rotations_[token * head_size_ + half + i] = std::sin(angle) * rotation_factor_;
    }
  at::Tensor logits = at::empty({batch_, head_->num_rows}, keys.options());
  Barrier barrier(num_threads);
#pragma omp parallel num_threads(num_threads)
  {
    const int index = omp_get_thread_num();
    const Thread thread{index, num_threads, barrier, *scratch_[index], scores_[index], marks_[index]};
    for (size_t number = 0; number < layers_.size(); ++number) run_layer(layers_[number], int64_t(number), thread);
    head(thread, logits);
  }
  return logits;
}

// Write the row of the embedding for one id as fp32.
void DecodeModel::embed(int64_t id, float* to) const {
  TORCH_CHECK(id >= 0 && id < embedding_.size(0), "decode: the id ", id, " must be from 0 to ", embedding_.size(0) - 1);
  if (embedding_.scalar_type() == at::kFloat) {
    std::copy_n(embedding_.const_data_ptr<float>() + id * width_, width_, to);
    return;
  }
  const at::BFloat16* row = embedding_.const_data_ptr<at::BFloat16>() + id * width_;
  for (int64_t i = 0; i < width_; ++i) to[i] = float(row[i]);
}

void DecodeModel::run_layer(const Layer& layer, int64_t number, const Thread& thread) {
  attend(layer, number, thread);
  feed_forward(layer, thread);
}

// The rows of one matrix that `tokens` tokens need, and the value that each token multiplies them with: that of its list,
// times its factor, times the scales of the stored weights.
void DecodeModel::build_job(Job& job, const StoredMatrix& matrix, int64_t which, int tokens,
                            const FeatureList* const* lists, const float* factors, float* const* out,
                            bool accumulates, const Thread& thread) {
  const float* row_scales = matrix.row_scales(which);
  const float scale = matrix.factor(which);
  job.matrix = matrix.matrix(which);
  job.matrix.by_integers = by_integers_;
  job.tokens = padded_tokens(tokens), job.used_tokens = tokens, job.accumulates = accumulates;
  std::copy_n(out, tokens, job.out);
  const int64_t most = matrix.num_rows;
  const double all_from = all_rows_from_[tokens <= 1 ? 0 : tokens <= 2 ? 1 : tokens <= 4 ? 2 : 3] * double(most);
  job.reads_unneeded = false;
  // The scale of a ternary matrix and a factor of the token change the step of its values; scales per row would leave none.
  job.has_steps = !row_scales;
  for (int t = 0; t < job.tokens; ++t) {
    const float step = t < tokens ? std::fabs(lists[t]->step * factors[t] * scale) : 1.0f;
    job.has_steps = job.has_steps && step > 0;
    job.steps[t] = step;
  }
  // One token needs every feature of its list.
  const bool one_needs_all = tokens == 1 && double(lists[0]->length) >= all_from && lists[0]->length < most;
  if (tokens == 1 && !row_scales && scale * factors[0] == 1.0f && !one_needs_all) {
    job.rows = lists[0]->features, job.values = lists[0]->values, job.num_rows = lists[0]->length;
    return;
  }
  if (int64_t(job.value_buffer.size()) < most * job.tokens) job.value_buffer.resize(most * job.tokens);
  if (int64_t(job.row_buffer.size()) < most) job.row_buffer.resize(most);
  float* values = job.value_buffer.data();
  const auto place = [&](int t, int64_t k, int64_t row, int64_t feature) {
    const float scaled = lists[t]->values[k] * factors[t] * scale;
    values[row * job.tokens + t] = row_scales ? scaled * row_scales[feature] : scaled;
  };
  job.values = values;
  if (tokens == 1 && !one_needs_all) {
    job.rows = lists[0]->features, job.num_rows = lists[0]->length;
    for (int64_t k = 0; k < job.num_rows; ++k) place(0, k, k, job.rows[k]);
    return;
  }
  const auto read_all = [&] {
    job.rows = every_row_.data(), job.num_rows = most, job.reads_unneeded = true;
    std::fill_n(values, most * job.tokens, 0.0f);
    for (int t = 0; t < tokens; ++t)
      for (int64_t k = 0; k < lists[t]->length; ++k) place(t, k, lists[t]->features[k], lists[t]->features[k]);
  };
  if (one_needs_all) return read_all();
  int32_t* marks = thread.marks.data();
  for (int t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < lists[t]->length; ++k) marks[lists[t]->features[k]] = 1;
  job.num_rows = 0;
  for (int64_t feature = 0; feature < most; ++feature) {
    job.row_buffer[job.num_rows] = int32_t(feature);
    const int32_t needed = marks[feature];
    marks[feature] = int32_t(job.num_rows);
    job.num_rows += needed;
  }
  if (double(job.num_rows) >= all_from && job.num_rows < most) {
    std::fill_n(marks, most, 0);
    return read_all();
  }
  job.rows = job.row_buffer.data();
  std::fill_n(values, job.num_rows * job.tokens, 0.0f);
  for (int t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < lists[t]->length; ++k)
      place(t, k, marks[lists[t]->features[k]], lists[t]->features[k]);
  std::fill_n(marks, most, 0);
}

// Compute all jobs, each thread a part of the rows of every job; then add the partial sums, each thread for some columns.
void DecodeModel::run_jobs(const Thread& thread, int64_t num_jobs) {
  int64_t begin, end;
  const auto part_of = [&](const Job& job) -> ChosenRows {
    slice(job.num_rows, 4, thread.index, thread.count, begin, end);
    return {job.rows + begin, job.values + begin * job.tokens, end - begin, job.has_steps ? job.steps : nullptr};
  };
  request_first_rows(jobs_[0].matrix, part_of(jobs_[0]));
  for (int64_t number = 0; number < num_jobs; ++number) {
    const Job& job = jobs_[number];
    if (number + 1 < num_jobs) request_first_rows(jobs_[number + 1].matrix, part_of(jobs_[number + 1]));
    float* sums[kMaxTokens];
    for (int t = 0; t < job.tokens; ++t) sums[t] = partial_sums(thread.index, number, t);
    multiply(job.matrix, job.tokens, part_of(job), sums);
    if (thread.index > 0) continue;
    bytes_read_ += job.num_rows * job.matrix.row_bytes;
    ++passes_, whole_passes_ += job.reads_unneeded;
  }
  thread.barrier.wait();
  for (int64_t number = 0; number < num_jobs; ++number) {
    const Job& job = jobs_[number];
    slice(job.matrix.num_columns, kUnit, thread.index, thread.count, begin, end);
    for (int t = 0; t < job.used_tokens; ++t)
      for (int64_t column = begin; column < end; column += kLanes) {
        float* to = job.out[t] + column;
        Floats total = job.accumulates ? load<Floats>(to) : Floats{};
        for (int part = 0; part < thread.count; ++part) total += load<Floats>(partial_sums(part, number, t) + column);
        store(to, total);
      }
  }
}

// Set `out[b]` to, or add to it, the product of the list of every token with one matrix.
void DecodeModel::project(const StoredMatrix& matrix, const ListBuffer& lists, Rows& out, bool accumulates,
                          const Thread& thread) {
  for (int64_t group = 0; group < num_token_groups(); ++group) {
    if (!thread.takes(group)) continue;
    const FeatureList* of_tokens[kMaxTokens];
    float factors[kMaxTokens], *to[kMaxTokens];
    const int64_t first = group * kMaxTokens, count = std::min<int64_t>(kMaxTokens, batch_ - first);
    for (int64_t t = 0; t < count; ++t)
      of_tokens[t] = &lists.lists[first + t], factors[t] = 1, to[t] = out[first + t];
    build_job(jobs_[group], matrix, 0, int(count), of_tokens, factors, to, accumulates, thread);
  }
  thread.barrier.wait();
  run_jobs(thread, num_token_groups());
  if (thread.index == 0) bytes_dense_ += num_token_groups() * matrix.whole_bytes;
  thread.barrier.wait();
}

void add_bias(const at::Tensor& bias, float* to) {
  for (int64_t i = 0; i < bias.numel(); ++i) to[i] += floats(bias)[i];
}

void DecodeModel::attend(const Layer& layer, int64_t number, const Thread& thread) {
  for (int64_t token = 0; token < batch_; ++token) {
    if (!thread.takes(token)) continue;
    rms_norm(stream_[token], floats(layer.attention_norm), epsilon_, normed_[token], width_);
    select_features(layer.attention_input->settings, 0, normed_[token], thread.scratch, lists_.lists[token]);
  }
  if (batch_ > 1) thread.barrier.wait();
  project(*layer.qkv, lists_, qkv_, false, thread);
  if (latent_.rank) {
    store_latents(layer, number, thread);
    for (int64_t item = 0; item < batch_ * num_heads_; ++item)
      if (thread.takes(item)) attend_latent_head(layer, number, item / num_heads_, item % num_heads_, thread);
  } else {
    finish_qkv(layer, thread);
    for (int64_t item = 0; item < batch_ * num_kv_heads_; ++item)
      if (thread.takes(item)) attend_group(layer, number, item / num_kv_heads_, item % num_kv_heads_, thread.scores);
  }
  thread.barrier.wait();
  for (int64_t token = 0; token < batch_; ++token)
    if (thread.takes(token)) {
      select_features(layer.attention_output->settings, 0, mixed_[token], thread.scratch, lists_.lists[token]);
      // To the residual stream, to which the product is added.
      add_bias(layer.output_bias, stream_[token]);
    }
  if (batch_ > 1) thread.barrier.wait();
  project(*layer.output, lists_, stream_, true, thread);
}

// Rotate the pair (channel i, channel i + C / 2) by the angle of the position.
void rotate(float* head, int64_t head_size, const float* cosines, const float* sines) {
  const int64_t half = head_size / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = head[i], second = head[half + i];
    head[i] = first * cosines[i] - second * sines[i];
    head[half + i] = second * cosines[i] + first * sines[i];
  }
}

// The bias, and the norms over all heads of a token, which no thread can compute that has some of the heads only.
void DecodeModel::finish_qkv(const Layer& layer, const Thread& thread) {
  const bool norms_together = std::max(layer.query_norm.numel(), layer.key_norm.numel()) > head_size_;
  if (!layer.qkv_bias.numel() && !norms_together) return;
  for (int64_t token = 0; token < batch_; ++token) {
    if (!thread.takes(token)) continue;
    add_bias(layer.qkv_bias, qkv_[token]);
    float* key = qkv_[token] + num_heads_ * head_size_;
    // A norm with the weights of one head is that of attend_group.
    if (const int64_t count = layer.query_norm.numel(); count > head_size_)
      rms_norm(qkv_[token], floats(layer.query_norm), epsilon_, qkv_[token], count);
    if (const int64_t count = layer.key_norm.numel(); count > head_size_)
      rms_norm(key, floats(layer.key_norm), epsilon_, key, count);
  }
  thread.barrier.wait();
}

// `mixed` = the values of `count` tokens, weighted with the softmax of the scaled products of `query` with their keys.
void attend_to(const float* query, const float* keys, const float* values, int64_t count, int64_t size, float scale,
               std::vector<float>& scores, float* mixed) {
  float largest = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < count; ++i) {
    scores[i] = dot(query, keys + i * size, size) * scale;
    largest = std::max(largest, scores[i]);
  }
  std::fill_n(scores.data() + count, kLanes, -std::numeric_limits<float>::infinity());
  Floats totals = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats weights = exponential(load<Floats>(scores.data() + i) - largest);
    store(scores.data() + i, weights);
    totals += weights;
  }
  weighted_sum(values, scores.data(), count, size, mixed);
  const float inverse = 1.0f / sum(totals);
  for (int64_t i = 0; i < size; ++i) mixed[i] *= inverse;
}

// One token's query heads that share key and value head `group`: its key and value are stored before they are read.
void DecodeModel::attend_group(const Layer& layer, int64_t number, int64_t token, int64_t group,
                               std::vector<float>& scores) {
  const int64_t size = head_size_, heads = num_heads_ / num_kv_heads_, position = positions_[token];
  float* key = qkv_[token] + (num_heads_ + group) * size;
  const float* value = qkv_[token] + (num_heads_ + num_kv_heads_ + group) * size;
  const float *cosines = rotations_.data() + token * size, *sines = cosines + size / 2;
  if (layer.key_norm.numel() == size) rms_norm(key, floats(layer.key_norm), epsilon_, key, size);
  rotate(key, size, cosines, sines);
  const int64_t offset = number * cache_stride_layer_ + token * cache_stride_batch_ + group * cache_stride_head_;
  float *keys = keys_ + offset, *values = values_ + offset;
  const int64_t slot = position % capacity_, count = std::min(position + 1, capacity_);
  std::copy_n(key, size, keys + slot * size);
  std::copy_n(value, size, values + slot * size);
  for (int64_t head = group * heads; head < (group + 1) * heads; ++head) {
    float* query = qkv_[token] + head * size;
    if (layer.query_norm.numel() == size) rms_norm(query, floats(layer.query_norm), epsilon_, query, size);
    rotate(query, size, cosines, sines);
    float* mixed = mixed_[token] + head * size;
    attend_to(query, keys, values, count, size, 1.0f / std::sqrt(float(size)), scores, mixed);
  }
}

// Norm the parts of every token's product with the first matrix in place, rotate its key, and store vector and key.
void DecodeModel::store_latents(const Layer& layer, int64_t number, const Thread& thread) {
  const int64_t size = latent_.rotated, cached = latent_.cached();
  for (int64_t token = 0; token < batch_; ++token) {
    if (!thread.takes(token)) continue;
    float *query = qkv_[token], *vector = query + qkv_columns() - cached;
    const float* cosines = rotations_.data() + token * size;
    if (latent_.queries) rms_norm(query, floats(layer.query_latent_norm), latent_.epsilon, query, latent_.queries);
    rms_norm(vector, floats(layer.latent_norm), latent_.epsilon, vector, latent_.rank);
    rotate(vector + latent_.rank, size, cosines, cosines + size / 2);
    float* keys = keys_ + number * cache_stride_layer_ + token * cache_stride_batch_;
    std::copy_n(vector, cached, keys + positions_[token] % capacity_ * cached);
  }
  if (thread.index == 0) {
    const int64_t read = (layer.query_up.numel() + layer.latent_up.numel()) * int64_t(sizeof(float));
    bytes_read_ += read, bytes_dense_ += read;
  }
  thread.barrier.wait();
}

// One head of one token (arXiv 2405.04434, section 2.1.2): the query is multiplied with the matrix of the keys, and the
// mixed latent vectors with that of the values, so that no key or value of an earlier token is computed.
void DecodeModel::attend_latent_head(const Layer& layer, int64_t number, int64_t token, int64_t head,
                                     const Thread& thread) {
  const int64_t plain = latent_.plain, rank = latent_.rank, cached = latent_.cached(), size = latent_.query_size();
  float *query = latent_rows_[thread.index].data(), *absorbed = query + size, *mixed = absorbed + cached;
  if (latent_.queries) {
    const float* rows = floats(layer.query_up) + head * size * latent_.queries;
    for (int64_t i = 0; i < size; ++i) query[i] = dot(qkv_[token], rows + i * latent_.queries, latent_.queries);
  } else {
    std::copy_n(qkv_[token] + head * size, size, query);
  }
  const float* cosines = rotations_.data() + token * latent_.rotated;
  rotate(query + plain, latent_.rotated, cosines, cosines + latent_.rotated / 2);
  const float* up = floats(layer.latent_up) + head * (plain + latent_.value) * rank;
  weighted_sum(up, query, plain, rank, absorbed);
  std::copy_n(query + plain, latent_.rotated, absorbed + rank);
  const float* keys = keys_ + number * cache_stride_layer_ + token * cache_stride_batch_;
  const int64_t count = std::min(positions_[token] + 1, capacity_);
  // The rotated keys are mixed too, and left out below: their few channels cost less than a stride would.
  attend_to(absorbed, keys, keys, count, cached, latent_.scale, thread.scores, mixed);
  float* to = mixed_[token] + head * latent_.value;
  for (int64_t i = 0; i < latent_.value; ++i) to[i] = dot(mixed, up + (plain + i) * rank, rank);
}

void DecodeModel::feed_forward(const Layer& layer, const Thread& thread) {
  const bool routed = bool(layer.routed), dense = bool(layer.dense);
  const int64_t choices = routed ? layer.router->experts_per_token : 0;
  const bool shares_selection = routed && layer.routed->input->settings.uniform();
  for (int64_t token = 0; token < batch_; ++token) {
    if (!thread.takes(token)) continue;
    float* normed = normed_[token];
    rms_norm(stream_[token], floats(layer.feed_forward_norm), epsilon_, normed, width_);
    if (shares_selection)
      select_features(layer.routed->input->settings, 0, normed, thread.scratch, lists_.lists[token * choices]);
    if (dense) select_features(layer.dense->input->settings, 0, normed, thread.scratch, dense_lists_.lists[token]);
    token_share_[token] = 1;
    if (layer.token_gate.numel())
      token_share_[token] = 1.0f / (1.0f + std::exp(-dot(normed, floats(layer.token_gate), width_)));
    if (routed && layer.router->reads_sparse) {
      std::fill_n(router_rows_[token], width_, 0.0f);
      const FeatureList& list = lists_.lists[token * choices];
      for (int64_t k = 0; k < list.length; ++k) router_rows_[token][list.features[k]] = list.values[k];
    }
  }
  thread.barrier.wait();
  if (routed) {
    route(layer, thread);
    if (!shares_selection) {
      for (int64_t place = 0; place < batch_ * choices; ++place)
        if (thread.takes(place) && chosen_[place] != kUnused)
          select_features(layer.routed->input->settings, chosen_[place], normed_[place / choices], thread.scratch,
                          lists_.lists[place]);
      thread.barrier.wait();
    }
  }
  const int64_t expert_jobs = routed ? int64_t(expert_tokens_.size()) : 0, dense_jobs = dense ? num_token_groups() : 0;
  const auto matrices = [](const FeedForwardHolder& part) { return part.gate && !part.gate_first ? 2 : 1; };
  const int64_t num_jobs = (routed ? matrices(*layer.routed) * expert_jobs : 0) +
                           (dense ? matrices(*layer.dense) * dense_jobs : 0);
  build_expert_jobs(layer, thread);
  thread.barrier.wait();
  run_jobs(thread, num_jobs);
  thread.barrier.wait();
  run_up_jobs(layer, thread);
  const auto select_hidden = [&](const FeedForwardHolder& part, Rows& gate, Rows& up, int64_t row, int64_t expert,
                                 FeatureList& list) {
    activate_row(activation_, part.gate ? gate[row] : nullptr, up[row], gate[row], part.hidden_columns());
    select_features(part.hidden->settings, expert, gate[row], thread.scratch, list);
  };
  for (int64_t place = 0; place < batch_ * choices; ++place)
    if (thread.takes(place) && chosen_[place] != kUnused)
      select_hidden(*layer.routed, gate_, up_, place, chosen_[place], hidden_lists_.lists[place]);
  for (int64_t token = 0; dense && token < batch_; ++token)
    if (thread.takes(token))
      select_hidden(*layer.dense, dense_gate_, dense_up_, token, 0, dense_hidden_lists_.lists[token]);
  thread.barrier.wait();
  build_down_jobs(layer, thread);
  thread.barrier.wait();
  run_jobs(thread, expert_jobs + dense_jobs);
  thread.barrier.wait();
}

void DecodeModel::route(const Layer& layer, const Thread& thread) {
  const RouterHolder& router = *layer.router;
  const int64_t experts = router.num_experts();
  Rows& router_input = router.reads_sparse ? router_rows_ : normed_;
  const int64_t begin = experts * thread.index / thread.count, end = experts * (thread.index + 1) / thread.count;
  for (int64_t expert = begin; expert < end; ++expert)
    for (int64_t token = 0; token < batch_; ++token)
      logits_[token][expert] = dot(router_input[token], floats(router.weight) + expert * width_, width_);
  thread.barrier.wait();
  for (int64_t token = 0; token < batch_; ++token)
    if (thread.takes(token)) choose_experts(router, token, thread.scores);
  if (batch_ > 1) thread.barrier.wait();
  if (thread.index == 0) plan_experts(layer);
  thread.barrier.wait();
}

// Return the index of the largest value (the first of equal ones) and remove it from the candidates.
int64_t take_largest(float* values, int64_t length) {
  const int64_t place = std::max_element(values, values + length) - values;
  values[place] = -std::numeric_limits<float>::infinity();
  return place;
}

void DecodeModel::choose_experts(const RouterHolder& router, int64_t token, std::vector<float>& scores) {
  const int64_t experts = router.num_experts(), choices = router.experts_per_token;
  const float* logits = logits_[token];
  int64_t* chosen = chosen_.data() + token * choices;
  float* weights = weights_.data() + token * choices;
  const float largest = *std::max_element(logits, logits + experts);
  float total = 0;
  for (int64_t expert = 0; expert < experts; ++expert) total += std::exp(logits[expert] - largest);
  const auto score = [&](int64_t expert) {
    return router.sigmoid ? 1.0f / (1.0f + std::exp(-logits[expert])) : std::exp(logits[expert] - largest) / total;
  };
  // Without biases and groups the choice is by the logits, which are never rounded to the same 0 or 1.
  const bool by_scores = router.bias.numel() || router.num_groups > 1;
  for (int64_t expert = 0; expert < experts; ++expert) {
    scores[expert] = by_scores ? score(expert) : logits[expert];
    if (router.bias.numel()) scores[expert] += floats(router.bias)[expert];
  }
  if (router.num_groups > 1) {
    const int64_t size = experts / router.num_groups;
    // Behind the scores of the experts there is space for those of the groups (see reserve).
    float* of_group = scores.data() + experts;
    for (int64_t group = 0; group < router.num_groups; ++group) {
      const float* values = scores.data() + group * size;
      float first = -std::numeric_limits<float>::infinity(), second = first;
      for (int64_t i = 0; i < size; ++i) {
        second = std::max(second, std::min(first, values[i]));
        first = std::max(first, values[i]);
      }
      of_group[group] = router.group_by_two ? first + second : first;
    }
    // The chosen groups are taken out of the candidates, so that those that remain are the ones not allowed.
    for (int64_t i = 0; i < router.groups_per_token; ++i) take_largest(of_group, router.num_groups);
    for (int64_t expert = 0; expert < experts; ++expert)
      if (of_group[expert / size] != -std::numeric_limits<float>::infinity())
        scores[expert] = -std::numeric_limits<float>::infinity();
  }
  // The weights of a router that chooses the first `count` of `ids`.
  const auto weigh = [&](const int64_t* ids, int64_t count, float* to) {
    float sum_of_chosen = 0;
    for (int64_t a = 0; a < count; ++a) {
      to[a] = router.softmax_of_chosen ? std::exp(logits[ids[a]] - largest) : score(ids[a]);
      sum_of_chosen += to[a];
    }
    for (int64_t a = 0; a < count; ++a) {
      if (router.softmax_of_chosen) to[a] /= sum_of_chosen;
      if (router.renormalized) to[a] /= sum_of_chosen + 1e-20f;  // as moe.router: the scores may all be 0
      to[a] *= router.scaling;
    }
  };
  if (router.weighed == choices && router.top_p == 1.0) {
    for (int64_t a = 0; a < choices; ++a) chosen[a] = take_largest(scores.data(), experts);
    weigh(chosen, choices, weights);
    return;
  }
  thread_local std::vector<int64_t> ids;
  thread_local std::vector<float> all;
  ids.resize(router.weighed), all.resize(router.weighed);
  for (int64_t& id : ids) id = take_largest(scores.data(), experts);
  weigh(ids.data(), router.weighed, all.data());
  // In double, as moe.router adds them, so that both stop at the same choice.
  const double sum_of_all = std::accumulate(all.begin(), all.end(), 0.0);
  double kept = 0;
  int64_t used = 0;
  for (; used < choices && (used == 0 || router.top_p == 1.0 || kept < router.top_p * sum_of_all); ++used) kept += all[used];
  if (router.fewer_weights == FewerWeights::kRouter) weigh(ids.data(), used, all.data());
  const float scale = router.fewer_weights == FewerWeights::kRenormalized ? float(sum_of_all / (kept + 1e-20)) : 1.0f;
  for (int64_t a = 0; a < choices; ++a) chosen[a] = a < used ? ids[a] : kUnused, weights[a] = a < used ? all[a] * scale : 0.0f;
}

// Sort the choices of all tokens by expert, and cut them into groups that share one pass over an expert's rows.
void DecodeModel::plan_experts(const Layer& layer) {
  const int64_t choices = layer.router->experts_per_token, places = batch_ * choices;
  for (int64_t place = 0; place < places; ++place) members_[place] = place;
  std::stable_sort(members_.begin(), members_.begin() + places,
                   [&](int64_t a, int64_t b) { return chosen_[a] < chosen_[b]; });
  expert_tokens_.clear();
  int64_t unused = 0;
  while (unused < places && chosen_[members_[unused]] == kUnused) ++unused;
  for (int64_t begin = unused; begin < places;) {
    const int64_t expert = chosen_[members_[begin]];
    int64_t end = begin;
    while (end < places && end - begin < kMaxTokens && chosen_[members_[end]] == expert) ++end;
    expert_tokens_.push_back({expert, begin, end - begin});
    begin = end;
  }
}

// Call `visit(part, expert, tokens, lists, gates, ups)` for every group of at most 8 tokens that share a pass over the rows of
// an expert, and then for the groups of the dense part.
template <typename Visit>
void DecodeModel::for_expert_groups(const Layer& layer, const Visit& visit) {
  const FeatureList* lists[kMaxTokens];
  float *gates[kMaxTokens], *ups[kMaxTokens];
  if (layer.routed) {
    const int64_t choices = layer.router->experts_per_token;
    const bool shares_selection = layer.routed->input->settings.uniform();
    for (const ExpertTokens& group : expert_tokens_) {
      for (int64_t t = 0; t < group.count; ++t) {
        const int64_t place = members_[group.begin + t];
        lists[t] = &lists_.lists[shares_selection ? place / choices * choices : place];
        gates[t] = gate_[place], ups[t] = up_[place];
      }
      visit(*layer.routed, group.expert, int(group.count), lists, gates, ups);
    }
  }
  for (int64_t first = 0; layer.dense && first < batch_; first += kMaxTokens) {
    const int64_t count = std::min<int64_t>(kMaxTokens, batch_ - first);
    for (int64_t t = 0; t < count; ++t) {
      lists[t] = &dense_lists_.lists[first + t];
      gates[t] = dense_gate_[first + t], ups[t] = dense_up_[first + t];
    }
    visit(*layer.dense, 0, int(count), lists, gates, ups);
  }
}

// Gate and up of every group of tokens; only gate, where up follows it.
void DecodeModel::build_expert_jobs(const Layer& layer, const Thread& thread) {
  float factors[kMaxTokens];
  std::fill_n(factors, kMaxTokens, 1.0f);
  int64_t number = 0;
  for_expert_groups(layer, [&](const FeedForwardHolder& part, int64_t expert, int tokens, const FeatureList* const* lists,
                               float* const* gates, float* const* ups) {
    if (part.gate) {
      if (thread.takes(number)) build_job(jobs_[number], *part.gate, expert, tokens, lists, factors, gates, false, thread);
      ++number;
    }
    if (!part.gate_first) {
      if (thread.takes(number)) build_job(jobs_[number], *part.up, expert, tokens, lists, factors, ups, false, thread);
      ++number;
    }
    if (thread.index == 0) {
      bytes_dense_ += part.up->whole_bytes;
      if (part.gate) bytes_dense_ += part.gate->whole_bytes;
    }
  });
}

// The rows of up that at least one of the tokens needs, and the tokens without the features that the site dropped.
void DecodeModel::build_up_job(UpJob& job, const FeedForwardHolder& part, int64_t expert, int tokens,
                               const FeatureList* const* lists, float* const* gates, float* const* ups) {
  job.matrix = part.up->matrix(expert);
  job.units = part.up->stored_columns / kUnit, job.tokens = padded_tokens(tokens);
  const int64_t features = part.up->num_rows, stride = job.units * kLanes;
  if (int64_t(job.rows.size()) < features) job.rows.resize(features);
  if (int64_t(job.dense.size()) < 2 * stride) job.dense.resize(2 * stride);
  if (int64_t(job.first.size()) < kMaxTokens * stride) job.first.resize(kMaxTokens * stride), job.second.resize(kMaxTokens * stride);
  job.num_rows = 0;
  for (int64_t feature = 0; feature < features; ++feature) {
    bool needed = false;
    // Not `gate > 0`, so that the row behind a NaN is computed and the NaN stays visible.
    for (int t = 0; t < tokens; ++t) needed |= !(gates[t][feature] <= 0);
    job.rows[job.num_rows] = int32_t(feature);
    job.num_rows += needed;
  }
  for (int t = 0; t < job.tokens; ++t) {
    std::fill_n(job.dense.data(), 2 * stride, 0.0f);
    for (int64_t k = 0; t < tokens && k < lists[t]->length; ++k) job.dense[lists[t]->features[k]] = lists[t]->values[k];
    split_units(job.matrix.format, job.dense.data(), job.units, job.first.data() + t * stride, job.second.data() + t * stride);
    job.out[t] = t < tokens ? ups[t] : spare_[0];
    // The activation multiplies what is not computed with a gate of 0, and an old value may be infinite.
    if (t < tokens) std::fill_n(ups[t], part.hidden_columns(), 0.0f);
  }
}

// The up projections that wait for their gates. Outputs are divided among the threads, so that nothing is added at the end.
void DecodeModel::run_up_jobs(const Layer& layer, const Thread& thread) {
  int64_t number = 0;
  for_expert_groups(layer, [&](const FeedForwardHolder& part, int64_t expert, int tokens, const FeatureList* const* lists,
                               float* const* gates, float* const* ups) {
    if (!part.gate_first) return;
    if (thread.takes(number)) build_up_job(up_jobs_[number], part, expert, tokens, lists, gates, ups);
    ++number;
  });
  if (number == 0) return;
  thread.barrier.wait();
  for (int64_t job_number = 0; job_number < number; ++job_number) {
    const UpJob& job = up_jobs_[job_number];
    int64_t begin, end;
    slice(job.num_rows, 4, thread.index, thread.count, begin, end);
    dot_chosen(job.tokens, job.matrix.format, job.matrix.data, job.matrix.row_bytes, job.units,
               {job.first.data(), job.second.data()}, job.rows.data() + begin, end - begin, job.out);
    if (thread.index == 0) bytes_read_ += job.num_rows * job.matrix.row_bytes, ++passes_;
  }
  thread.barrier.wait();
}

// Down: the routing weight of an expert, or the share of the shared experts, is a factor of the hidden features.
void DecodeModel::build_down_jobs(const Layer& layer, const Thread& thread) {
  const FeatureList* lists[kMaxTokens];
  float factors[kMaxTokens], *out[kMaxTokens];
  int64_t number = 0;
  const auto add = [&](const FeedForwardHolder& part, int64_t expert, int64_t count) {
    if (thread.takes(number)) build_job(jobs_[number], *part.down, expert, int(count), lists, factors, out, true, thread);
    ++number;
    if (thread.index == 0) bytes_dense_ += part.down->whole_bytes;
  };
  if (layer.routed) {
    const int64_t choices = layer.router->experts_per_token;
    for (const ExpertTokens& group : expert_tokens_) {
      for (int64_t t = 0; t < group.count; ++t) {
        const int64_t place = members_[group.begin + t];
        lists[t] = &hidden_lists_.lists[place], factors[t] = weights_[place], out[t] = stream_[place / choices];
      }
      add(*layer.routed, group.expert, group.count);
    }
  }
  for (int64_t first = 0; layer.dense && first < batch_; first += kMaxTokens) {
    const int64_t count = std::min<int64_t>(kMaxTokens, batch_ - first);
    for (int64_t t = 0; t < count; ++t) {
      lists[t] = &dense_hidden_lists_.lists[first + t];
      factors[t] = token_share_[first + t], out[t] = stream_[first + t];
    }
    add(*layer.dense, 0, count);
  }
}

void DecodeModel::head(const Thread& thread, at::Tensor& logits) {
  const NumberFormat format = head_->format;
  const int64_t units = head_->stored_columns / kUnit, vocabulary = head_->num_rows;
  for (int64_t token = 0; token < batch_; ++token) {
    if (!thread.takes(token)) continue;
    std::fill_n(normed_[token], units * kUnit, 0.0f);
    rms_norm(stream_[token], floats(final_norm_), epsilon_, normed_[token], width_);
    const int64_t at = token * units * kLanes;
    split_units(format, normed_[token], units, head_first_.data() + at, head_second_.data() + at);
  }
  thread.barrier.wait();
  const int64_t begin = vocabulary * thread.index / thread.count, end = vocabulary * (thread.index + 1) / thread.count;
  for (int64_t first = 0; first < batch_; first += kMaxTokens) {
    const int count = int(std::min<int64_t>(kMaxTokens, batch_ - first));
    float* out[kMaxTokens];
    for (int t = 0; t < kMaxTokens; ++t)
      out[t] = t < count ? logits.data_ptr<float>() + (first + t) * vocabulary : spare_[0];
    const int64_t at = first * units * kLanes;
    const Matrix weights = head_->matrix(0);
    dot_range(padded_tokens(count), format, weights.data, weights.row_bytes, units,
              {head_first_.data() + at, head_second_.data() + at}, head_->row_scales(0), out, begin, end);
    if (thread.index == 0) bytes_read_ += vocabulary * weights.row_bytes, bytes_dense_ += vocabulary * weights.row_bytes;
  }
}

// The product of one matrix with T tokens, for tests and to measure from which share on reading all rows is faster. With a
// `step`, the values are whole multiples of it, from -128 to 127.
at::Tensor row_product(const intrusive_ptr<StoredMatrix>& stored, int64_t which, const at::Tensor& rows,
                       const at::Tensor& values, double step, bool by_integers) {
  TORCH_CHECK(rows.dim() == 1 && rows.scalar_type() == at::kInt && rows.is_contiguous(),
              "row_product: rows must be contiguous int32 (K)");
  TORCH_CHECK(values.dim() == 2 && values.scalar_type() == at::kFloat && values.is_contiguous() &&
                  values.size(0) == rows.size(0) && values.size(1) >= 1 && values.size(1) <= kMaxTokens,
              "row_product: values must be contiguous fp32 (K, T), T at most ", kMaxTokens);
  const int tokens = int(values.size(1)), all = padded_tokens(tokens), num_threads = at::get_num_threads();
  const int64_t num_rows = rows.size(0), columns = padded(stored->num_columns);
  at::Tensor scaled = at::zeros({num_rows, all}, values.options());
  at::Tensor parts = at::empty({num_threads, all, columns}, values.options());
  const float *row_scales = stored->row_scales(which), factor = stored->factor(which);
  const int32_t* row = rows.const_data_ptr<int32_t>();
  for (int64_t k = 0; k < num_rows; ++k)
    for (int t = 0; t < tokens; ++t)
      scaled.data_ptr<float>()[k * all + t] =
          values.const_data_ptr<float>()[k * tokens + t] * factor * (row_scales ? row_scales[row[k]] : 1.0f);
  Matrix matrix = stored->matrix(which);
  matrix.by_integers = by_integers;
  float steps[kMaxTokens];
  std::fill_n(steps, kMaxTokens, float(step) * factor);
  const float* factors = scaled.const_data_ptr<float>();
  float* sums = parts.data_ptr<float>();
#pragma omp parallel num_threads(num_threads)
  {
    const int thread = omp_get_thread_num();
    int64_t begin, end;
    slice(num_rows, 4, thread, num_threads, begin, end);
    float* to[kMaxTokens];
    for (int t = 0; t < all; ++t) to[t] = sums + (int64_t(thread) * all + t) * columns;
    multiply(matrix, all, {row + begin, factors + begin * all, end - begin, step > 0 ? steps : nullptr}, to);
  }
  return parts.narrow(1, 0, tokens).narrow(2, 0, stored->num_columns).sum(0);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qsparse_moe, library) {
  using torch::init;
  library.class_<StoredMatrix>("StoredMatrix").def(init<at::Tensor, int64_t, int64_t, int64_t, at::Tensor, int64_t>());
  library.class_<SiteHolder>("Site").def(
      init<int64_t, int64_t, int64_t, int64_t, int64_t, std::vector<int64_t>, std::vector<double>, std::vector<int64_t>,
           bool>());
  library.class_<FeedForwardHolder>("FeedForward")
      .def(init<std::optional<intrusive_ptr<StoredMatrix>>, intrusive_ptr<StoredMatrix>, intrusive_ptr<StoredMatrix>,
                intrusive_ptr<SiteHolder>, intrusive_ptr<SiteHolder>, bool>());
  library.class_<RouterHolder>("Router").def(
      init<at::Tensor, at::Tensor, int64_t, int64_t, double, int64_t, bool, bool, bool, double, int64_t, int64_t, bool,
           bool>());
  library.class_<DecodeModel>("DecodeModel")
      .def(init<int64_t, int64_t, int64_t, double, int64_t, at::Tensor, double, at::Tensor, at::Tensor,
                intrusive_ptr<StoredMatrix>>())
      .def("use_latent_attention", &DecodeModel::use_latent_attention)
      .def("add_layer", &DecodeModel::add_layer)
      .def("add_latent_maps", &DecodeModel::add_latent_maps)
      .def("read_all_rows_from", &DecodeModel::read_all_rows_from)
      .def("multiply_by_integers", &DecodeModel::multiply_by_integers)
      .def("last_step", &DecodeModel::last_step)
      .def("step", &DecodeModel::step);
  library.def(
      "row_product(__torch__.torch.classes.qsparse_moe.StoredMatrix stored, int which, Tensor rows, Tensor values, "
      "float step=0.0, bool by_integers=True) -> Tensor");
}

TORCH_LIBRARY_IMPL(qsparse_moe, CPU, library) { library.impl("row_product", &row_product); }
