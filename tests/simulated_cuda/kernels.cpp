// What runs on the device: any operator that the CPU has, on tensors that say they are the device's.

#include "graphs.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <torch/library.h>

#include <unordered_set>

#include "generators.h"

namespace simulated {

// --- Tensors of the device, and the same bytes as tensors of the CPU

static at::Tensor make(c10::Storage storage, c10::DispatchKey key, caffe2::TypeMeta type, c10::IntArrayRef sizes,
                       c10::IntArrayRef strides, int64_t offset) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), type);
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
  return tensor;
}

static c10::Storage storage_on(int on, size_t bytes) {
  return c10::Storage(c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), int64_t(bytes),
                                                            allocate(bytes, on),
                                                            c10::GetAllocator(c10::DeviceType::CUDA), true));
}

static at::Tensor empty_on(int on, c10::IntArrayRef sizes, c10::IntArrayRef strides, caffe2::TypeMeta type) {
  auto bytes = at::detail::computeStorageNbytes(sizes, strides, type.itemsize());
  return make(storage_on(on, bytes), c10::DispatchKey::CUDA, type, sizes, strides, 0);
}

static at::Tensor view_of(const at::Tensor& base, const at::Tensor& alias) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(base.storage()),
                                                         base.key_set(), alias.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
  return tensor;
}

static at::Tensor on_host(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  auto& theirs = tensor.storage();
  c10::DataPtr data(const_cast<void*>(theirs.data()), c10::Device(c10::DeviceType::CPU));
  auto storage = c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), int64_t(theirs.nbytes()),
                                                       std::move(data), c10::GetAllocator(c10::DeviceType::CPU), true);
  auto alias = make(c10::Storage(std::move(storage)), c10::DispatchKey::CPU, tensor.dtype(), tensor.sizes(),
                    tensor.strides(), tensor.storage_offset());
  if (tensor.is_conj()) alias._set_conj(true);
  if (tensor.is_neg()) alias._set_neg(true);
  return alias;
}

static bool grow(const at::Tensor& tensor, const at::Tensor& alias) {
  auto& storage = tensor.storage();
  auto bytes = alias.storage().nbytes();
  bool has_moved = alias.storage().data() != storage.data() || bytes != storage.nbytes();
  if (has_moved) {
    auto data = allocate(bytes, tensor.device().index());
    if (bytes) std::memcpy(data.get(), alias.storage().data(), bytes);
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
  if (tensor.sizes() != alias.sizes() || tensor.strides() != alias.strides())
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
  return has_moved;
}

// --- What a call uses

struct Use {
  at::Tensor tensor;
  bool writes;
  std::string alias;  // of the schema: "a" for Tensor(a!)
};

struct Call {
  int on = -1;
  std::vector<Use> uses;
};

static bool takes_host_indices(const std::string& name) {
  static const std::unordered_set<std::string> names{"aten::index",      "aten::index_put_",  "aten::_index_put_impl_",
                                                     "aten::index_put",  "aten::_unsafe_index"};
  return names.count(name);
}

static bool is_mask(const at::Tensor& index) {
  return index.scalar_type() == at::kBool || index.scalar_type() == at::kByte;
}

// A number of the host's for all that one mask says: no index is made then.
static bool fills_by_mask(const std::string& name, at::ArrayRef<c10::IValue> arguments) {
  if (!takes_host_indices(name) || name == "aten::index" || name == "aten::_unsafe_index") return false;
  auto& value = arguments[2].toTensor();
  size_t count = 0, masks = 0;
  for (const std::optional<at::Tensor>& index : arguments[1].toOptionalTensorList().vec())
    if (index && index->defined()) {
      ++count;
      masks += is_mask(*index);
    }
  return count == 1 && masks == 1 && value.numel() == 1 && !value.is_cuda();
}

// The host looks for what is true in a mask among the indices.
static bool looks_at_masks(const std::string& name, at::ArrayRef<c10::IValue> arguments) {
  if (!takes_host_indices(name) || fills_by_mask(name, arguments)) return false;
  bool found = false;
  for (const std::optional<at::Tensor>& index : arguments[1].toOptionalTensorList().vec())
    found = found || (index && index->defined() && is_mask(*index));
  return found;
}

// Kernels that take a number take it from the host, and ask the device for one that is there.
static bool asks_for_number(const std::string& name, at::ArrayRef<c10::IValue> arguments) {
  static const std::unordered_set<std::string> names{"aten::masked_fill", "aten::masked_fill_", "aten::index_fill",
                                                     "aten::index_fill_"};
  return names.count(name) && arguments.back().isTensor() && arguments.back().toTensor().is_cuda();
}

// Most kernels take a number of the host's along; these copy it to the device first.
static bool copies_numbers(const std::string& name, at::ArrayRef<c10::IValue> arguments) {
  return name == "aten::where" || (takes_host_indices(name) && !fills_by_mask(name, arguments));
}

// Matrix products of groups have a kernel for one type alone; for others the host reads where groups end.
static bool reads_groups(const std::string& name, at::ArrayRef<c10::IValue> arguments) {
  return name == "aten::_grouped_mm" && arguments[0].toTensor().scalar_type() != at::kBFloat16;
}

static bool waits_for_device(const std::string& name, at::ArrayRef<c10::IValue> arguments) {
  static const std::unordered_set<std::string> names{
      "aten::nonzero",  "aten::masked_select", "aten::_unique2", "aten::unique_consecutive", "aten::unique_dim",
      "aten::equal",    "aten::bincount",      "aten::unique",   "aten::_unique"};
  if (name == "aten::repeat_interleave") return arguments.back().isNone();  // nobody says how many there are
  return names.count(name) || looks_at_masks(name, arguments) || asks_for_number(name, arguments) ||
         reads_groups(name, arguments);
}

static bool uses_blas(const std::string& name) {
  static const std::unordered_set<std::string> names{"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm",
                                                     "aten::mv", "aten::addmv", "aten::dot"};
  return names.count(name);
}

static bool makes_views(const c10::FunctionSchema& schema) {
  for (auto& returned : schema.returns())
    if (returned.alias_info() && !returned.alias_info()->isWrite()) return true;
  return false;
}

static void use(Call& call, const at::Tensor& tensor, const c10::Argument& argument) {
  if (!tensor.defined()) return;
  if (tensor.is_cuda()) {
    int on = tensor.device().index();
    TORCH_CHECK(call.on < 0 || call.on == on, "Expected all tensors to be on the same device, but found at least two "
                "devices, cuda:", call.on, " and cuda:", on, "!");
    call.on = on;
  }
  auto* alias = argument.alias_info();
  std::string name;
  if (alias && !alias->beforeSets().empty()) name = (*alias->beforeSets().begin()).toUnqualString();
  call.uses.push_back({tensor, alias && alias->isWrite(), name});
}

static Call read(const c10::FunctionSchema& schema, at::ArrayRef<c10::IValue> arguments) {
  Call call;
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto& value = arguments[i];
    auto& argument = schema.arguments()[i];
    if (value.isTensor()) use(call, value.toTensor(), argument);
    if (value.isTensorList())
      for (const at::Tensor& tensor : value.toTensorVector()) use(call, tensor, argument);
    if (value.isOptionalTensorList())
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList().vec())
        if (tensor) use(call, *tensor, argument);
    if (value.isDevice() && value.toDevice().is_cuda() && call.on < 0)
      call.on = value.toDevice().has_index() ? value.toDevice().index() : current_device();
  }
  if (call.on < 0) call.on = current_device();
  return call;
}

static bool reads_host_memory(const Call& call, const std::string& name, at::ArrayRef<c10::IValue> arguments) {
  bool found = false;
  for (auto& use : call.uses)
    if (!use.tensor.is_cuda() && use.tensor.dim() == 0) {
      found = found || copies_numbers(name, arguments);
    } else if (!use.tensor.is_cuda()) {
      TORCH_CHECK(takes_host_indices(name) && !use.writes,
                  "Expected all tensors to be on the same device, but found at least two devices, cuda:", call.on,
                  " and cpu! (", name, ")");
      found = true;
    }
  return found;
}

static std::vector<Range> ranges_of(const Call& call) {
  std::vector<Range> ranges;
  for (auto& use : call.uses)
    if (use.tensor.is_cuda()) {
      auto [low, high] = extent(use.tensor);
      if (low != high) ranges.push_back({low, high, use.writes});
    }
  return ranges;
}

// --- The same call on the CPU

static c10::IValue host_value(const c10::IValue& value, const c10::Argument& argument, int on) {
  if (value.isTensor()) return on_host(value.toTensor());
  if (value.isTensorList()) {
    std::vector<at::Tensor> tensors;
    for (const at::Tensor& tensor : value.toTensorVector()) tensors.push_back(on_host(tensor));
    return c10::List<at::Tensor>(tensors);
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> tensors;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList().vec())
      tensors.push_back(tensor ? std::optional<at::Tensor>(on_host(*tensor)) : std::nullopt);
    return tensors;
  }
  if (value.isDevice()) return c10::Device(c10::DeviceType::CPU);
  if (argument.name() == "generator") return host_generator(value, on);
  return value;
}

static void run(const c10::OperatorHandle& op, torch::jit::Stack& stack) {
  at::AutoDispatchBelowADInplaceOrView below;
  if (op.schema().name() == "aten::histc" && stack[0].toTensor().scalar_type() == at::kInt) {  // not the CPU's
    auto counts = at::histc(stack[0].toTensor().to(at::kFloat), stack[1].toInt(), stack[2].toScalar(),
                            stack[3].toScalar());
    stack = {counts.to(at::kInt)};
    return;
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
}

static at::Tensor of_device(const at::Tensor& result, const Call& call) {
  if (!result.defined()) return result;
  for (auto& use : call.uses)
    if (use.tensor.is_cuda() && result.storage().data() && use.tensor.storage().data() == result.storage().data())
      return view_of(use.tensor, result);
  auto made = empty_on(call.on, result.sizes(), result.strides(), result.dtype());
  if (made.storage().nbytes())
    std::memcpy(made.mutable_data_ptr(),
                static_cast<const char*>(result.storage().data()) + result.storage_offset() * result.element_size(),
                made.storage().nbytes());
  return made;
}

static const Use* aliased(const Call& call, const c10::Argument& returned) {
  auto* alias = returned.alias_info();
  if (!alias || !alias->isWrite()) return nullptr;
  auto name = (*alias->beforeSets().begin()).toUnqualString();
  for (auto& use : call.uses)
    if (use.writes && use.alias == name) return &use;
  return nullptr;
}

// Results of the CPU become results of the device. Fresh ones are also given back in `made`.
static c10::IValue device_value(const c10::IValue& result, const c10::Argument& returned, const Call& call,
                                std::vector<at::Tensor>& made) {
  if (result.isTensor()) {
    if (auto* use = aliased(call, returned)) return use->tensor;
    made.push_back(of_device(result.toTensor(), call));
    return made.back();
  }
  if (result.isTensorList()) {
    std::vector<at::Tensor> tensors;
    for (const at::Tensor& tensor : result.toTensorVector()) {
      made.push_back(of_device(tensor, call));
      tensors.push_back(made.back());
    }
    return c10::List<at::Tensor>(tensors);
  }
  return result;
}

static std::vector<at::Tensor> tensors_of(const c10::IValue& value) {
  if (value.isTensor()) return {value.toTensor()};
  if (value.isTensorList()) return value.toTensorVector();
  return {};
}

static std::vector<c10::IValue> host_values(const c10::FunctionSchema& schema, at::ArrayRef<c10::IValue> arguments,
                                            int on) {
  std::vector<c10::IValue> values;
  for (size_t i = 0; i < arguments.size(); ++i)
    values.push_back(host_value(arguments[i], schema.arguments()[i], on));
  return values;
}

// In the order of Call::uses.
static std::vector<at::Tensor> aliases_of(const std::vector<c10::IValue>& values) {
  std::vector<at::Tensor> aliases;
  for (auto& value : values) {
    for (auto& tensor : tensors_of(value))
      if (tensor.defined()) aliases.push_back(tensor);
    if (value.isOptionalTensorList())
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList().vec())
        if (tensor && tensor->defined()) aliases.push_back(*tensor);
  }
  return aliases;
}

static bool put_back(const Call& call, const std::vector<at::Tensor>& aliases) {
  bool has_grown = false;
  for (size_t i = 0; i < call.uses.size(); ++i)
    if (call.uses[i].writes && call.uses[i].tensor.is_cuda())
      has_grown = grow(call.uses[i].tensor, aliases[i]) || has_grown;
  return has_grown;
}

static void capture(Stream& stream, const c10::OperatorHandle& op, const Call& call, std::vector<Range> ranges,
                    std::vector<c10::IValue> arguments, std::vector<at::Tensor> made) {
  std::vector<at::Tensor> targets;
  for (auto& tensor : made) {
    bool is_view = false;
    for (auto& use : call.uses)
      is_view = is_view || (tensor.defined() && use.tensor.is_cuda() && tensor.storage().data() &&
                            use.tensor.storage().data() == tensor.storage().data());
    targets.push_back(is_view || !tensor.defined() ? at::Tensor() : on_host(tensor));
    if (targets.back().defined()) {
      auto [low, high] = extent(tensor);
      if (low != high) ranges.push_back({low, high, true});
    }
  }
  auto again = [op, arguments, targets](Stream&, uint64_t) {
    torch::jit::Stack stack(arguments);
    run(op, stack);
    size_t i = 0;
    auto& returns = op.schema().returns();
    for (size_t r = 0; r < stack.size(); ++r) {
      if (returns[r].alias_info() && returns[r].alias_info()->isWrite()) continue;
      for (auto& tensor : tensors_of(stack[r])) {
        if (targets[i].defined() && tensor.numel()) {
          at::AutoDispatchBelowADInplaceOrView below;
          targets[i].copy_(tensor);
        }
        ++i;
      }
    }
  };
  stream.capture->add(stream, op.schema().name(), std::move(ranges), again);
}

static void kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Lock lock;
  auto& schema = op.schema();
  auto arguments = torch::jit::last(*stack, schema.arguments().size());
  auto call = read(schema, arguments);
  auto& stream = current_stream(call.on);
  bool views = makes_views(schema);
  bool waits = reads_host_memory(call, schema.name(), arguments) || waits_for_device(schema.name(), arguments);
  if (waits) forbid_in_capture();
  TORCH_CHECK(!waits || !stream.capture, "CUDA error: operation not permitted when stream is capturing");

  auto values = host_values(schema, arguments, call.on);
  auto ranges = ranges_of(call);
  if (stream.capture && !views) stream.capture->save(ranges);
  if (uses_blas(schema.name())) {
    auto [low, high] = workspace(stream);
    ranges.push_back({low, high, true});
  }
  auto began = now();
  torch::jit::Stack results(values);
  run(op, results);
  if (put_back(call, aliases_of(values))) {  // results of other sizes than they had
    values = host_values(schema, arguments, call.on);
    ranges = ranges_of(call);
  }
  torch::jit::drop(*stack, arguments.size());
  std::vector<at::Tensor> made;
  for (size_t i = 0; i < results.size(); ++i)
    stack->push_back(device_value(results[i], schema.returns()[i], call, made));
  if (views) return;
  if (stream.capture) {
    capture(stream, op, call, std::move(ranges), std::move(values), std::move(made));
    return;
  }
  auto tick = begin(stream);
  for (auto& range : ranges) note(stream, tick, range.low, range.high, range.writes, schema.name(), nullptr);
  for (auto& tensor : made) {
    if (!tensor.defined()) continue;
    auto [low, high] = extent(tensor);
    bool is_view = false;
    for (auto& range : ranges) is_view = is_view || (range.low < high && low < range.high);
    if (!is_view) note(stream, tick, low, high, true, schema.name(), nullptr);
  }
  end(stream, now() - began);
  if (waits) wait_for(stream);
}

// --- Operators of the device's own

static int index_of(std::optional<at::Device> where) {
  return where && where->has_index() ? where->index() : current_device();
}

static caffe2::TypeMeta type_of(std::optional<at::ScalarType> type) {
  return c10::scalarTypeToTypeMeta(type.value_or(c10::get_default_dtype_as_scalartype()));
}

static at::Tensor empty(c10::IntArrayRef sizes, std::optional<at::ScalarType> type, std::optional<at::Layout>,
                        std::optional<at::Device> where, std::optional<bool>,
                        std::optional<at::MemoryFormat> format) {
  auto order = format.value_or(at::MemoryFormat::Contiguous);
  if (order == at::MemoryFormat::ChannelsLast)
    return empty_on(index_of(where), sizes, c10::get_channels_last_strides_2d(sizes), type_of(type));
  return empty_on(index_of(where), sizes, c10::contiguous_strides(sizes), type_of(type));
}

static at::Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<at::ScalarType> type,
                                std::optional<at::Layout>, std::optional<at::Device> where, std::optional<bool>) {
  return empty_on(index_of(where), sizes, strides, type_of(type));
}

static const at::Tensor& resize_(const at::Tensor& self, c10::IntArrayRef sizes, std::optional<at::MemoryFormat>) {
  auto strides = c10::contiguous_strides(sizes);
  auto bytes = at::detail::computeStorageNbytes(sizes, strides, self.dtype().itemsize(), self.storage_offset());
  auto* storage = self.storage().unsafeGetStorageImpl();
  if (bytes > storage->nbytes()) {
    auto data = allocate(bytes, self.device().index());
    if (storage->nbytes()) std::memcpy(data.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(data));
    storage->set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
  return self;
}

static at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef sizes,
                               c10::IntArrayRef strides) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  auto dense = c10::contiguous_strides(sizes);
  auto wanted = strides.size() == sizes.size() ? strides : c10::IntArrayRef(dense);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, wanted, offset);
  return self;
}

static at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  int64_t size = int64_t(source.nbytes() / self.dtype().itemsize());
  return set_storage(self, std::move(source), 0, {size}, {});
}

static at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

static at::Scalar local_scalar(const at::Tensor& self) {
  auto& stream = current_stream(self.device().index());
  {
    Lock lock;
    if (stream.capture) stream.capture->is_broken = true;
    TORCH_CHECK(!stream.capture, "CUDA error: operation not permitted when stream is capturing");
    auto tick = begin(stream);
    auto [low, high] = extent(self);
    note(stream, tick, low, high, false, "item", nullptr);
  }
  wait_for(stream);
  return at::native::_local_scalar_dense_cpu(on_host(self));
}

static void record_stream(at::Tensor& self, at::Stream) {
  Lock lock;
  auto* block = static_cast<Block*>(self.storage().data_ptr().get_context());
  if (block) block->is_recorded = true;
}

static int64_t math_attention(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                              const std::optional<at::Tensor>&, double, bool, std::optional<double>, bool) {
  return 0;  // the fused kernels have other operators on a GPU
}

// Convolutions of single channels are one operator on a GPU, which the CPU has under another name.
static at::Tensor depthwise(const at::Tensor& self, const at::Tensor& weight, c10::IntArrayRef,
                            const std::optional<at::Tensor>& bias, c10::IntArrayRef stride, c10::IntArrayRef padding,
                            c10::IntArrayRef dilation) {
  return at::conv2d(self, weight, bias, stride, padding, dilation, self.size(1));
}

static at::Tensor product_as(const at::Tensor& self, const at::Tensor& other, at::ScalarType type) {
  return at::mm(self.to(type), other.to(type));  // a GPU adds in that type, and rounds nothing before
}

// What the kernel of a GPU asks for, and its results: the logarithm of each row's sum has room for 32 rows at a time.
static std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> efficient_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const std::optional<at::Tensor>& bias,
    bool with_sums, double, bool, std::optional<double> scale) {
  auto rows = query.size(2);
  for (auto& tensor : {query, key, value}) {
    TORCH_CHECK(tensor.stride(-1) == 1, "rows must be contiguous");
    TORCH_CHECK(tensor.size(-1) % 8 == 0, "query is not correctly aligned");
  }
  auto scores = at::matmul(query.to(at::kFloat), key.to(at::kFloat).transpose(-2, -1)) *
                scale.value_or(1 / std::sqrt(double(query.size(-1))));
  if (bias) {
    TORCH_CHECK(bias->dtype() == query.dtype(), "invalid dtype for bias - should match query's dtype");
    TORCH_CHECK(bias->sizes() == scores.sizes() && bias->stride(-1) == 1, "invalid bias size");
    for (int64_t dim = 0; dim < 3; ++dim) TORCH_CHECK(bias->stride(dim) % 8 == 0, "attn_bias is not correctly aligned");
    scores = scores + bias->to(at::kFloat);
  }
  auto out = at::matmul(scores.softmax(-1), value.to(at::kFloat)).to(query.dtype());
  auto sums = with_sums ? at::constant_pad_nd(scores.logsumexp(-1), {0, (32 - rows % 32) % 32}, INFINITY)
                        : at::empty({0}, query.options().dtype(at::kFloat));
  return {out, sums, at::empty({}, at::kLong), at::empty({}, at::kLong)};
}

// --- Copies

static constexpr double BUS_BYTES_PER_S = 25e9;

static void move_bytes(const at::Tensor& target, const at::Tensor& source) {
  at::AutoDispatchBelowADInplaceOrView below;
  target.copy_(source);
}

static bool is_plain(const at::Tensor& self, const at::Tensor& source) {
  return self.sizes() == source.sizes() && self.dtype() == source.dtype() && self.is_contiguous() &&
         source.is_contiguous();
}

// What a copy on a stream does, once its turn has come.
static void copy_now(Stream& stream, uint64_t tick, const at::Tensor& target, const at::Tensor& source,
                     bool from_pinned, bool to_pinned) {
  move_bytes(target, source);
  if (from_pinned) copy_from_host(stream, tick, source);
  if (to_pinned) copy_to_host(stream, tick, target);
}

static at::Tensor& copy_(at::Tensor& self, const at::Tensor& given, bool non_blocking) {
  auto source = given.expand_as(self);
  if (!self.numel() || self.is_same(given)) return self;
  std::optional<Lock> lock(std::in_place);
  bool between = self.is_cuda() && source.is_cuda() && self.device() != source.device();
  bool crosses = self.is_cuda() != source.is_cuda();
  int on = source.is_cuda() ? source.device().index() : self.device().index();
  auto& stream = current_stream(on);
  auto& host_side = self.is_cuda() ? source : self;
  bool is_async = crosses && non_blocking && is_plain(self, source) &&
                  is_pinned(host_side.const_data_ptr(), host_side.nbytes());
  bool must_wait = crosses && !is_async;
  if (must_wait) forbid_in_capture();
  if (must_wait && stream.capture) stream.capture->is_broken = true;
  TORCH_CHECK(!must_wait || !stream.capture, "CUDA error: operation not permitted when stream is capturing");

  std::vector<Range> ranges;
  for (auto* tensor : {static_cast<const at::Tensor*>(&self), static_cast<const at::Tensor*>(&source)})
    if (tensor->is_cuda()) {
      auto [low, high] = extent(*tensor);
      ranges.push_back({low, high, tensor == &self});
    }
  auto target = on_host(self), bytes = on_host(source);
  bool from_pinned = is_async && self.is_cuda(), to_pinned = is_async && !self.is_cuda();
  if (stream.capture) {
    TORCH_CHECK(!between, "a copy between GPUs is not simulated in a capture");
    if (to_pinned) {
      auto [low, high] = extent(self);
      stream.capture->save({{low, high, true}});
    } else {
      stream.capture->save(ranges);
    }
    move_bytes(target, bytes);
    stream.capture->add(stream, "copy_", ranges, [=](Stream& branch, uint64_t tick) {
      copy_now(branch, tick, target, bytes, from_pinned, to_pinned);
    });
    return self;
  }
  if (between) {
    auto& there = current_stream(self.device().index());
    begin(there);
    join(stream.clock, there.clock);
    stream.busy_until = std::max(stream.busy_until, there.busy_until);
  }
  auto began = now();
  auto tick = begin(stream);
  for (auto& range : ranges) note(stream, tick, range.low, range.high, range.writes, "copy_", nullptr);
  copy_now(stream, tick, target, bytes, from_pinned, to_pinned);
  end(stream, crosses ? double(self.nbytes()) / BUS_BYTES_PER_S : now() - began);
  if (between) {
    auto& there = current_stream(self.device().index());
    join(there.clock, stream.clock);
    there.busy_until = std::max(there.busy_until, stream.busy_until);
  }
  lock.reset();
  if (must_wait) wait_for(stream);
  return self;
}

}  // namespace simulated

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&simulated::kernel>());
}

TORCH_LIBRARY_IMPL(aten, CPU, library) {
  library.impl("_conv_depthwise2d", simulated::depthwise);
  library.impl("mm.dtype", simulated::product_as);
  library.impl("_scaled_dot_product_efficient_attention", simulated::efficient_attention);
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", simulated::empty);
  library.impl("empty_strided", simulated::empty_strided);
  library.impl("resize_", simulated::resize_);
  library.impl("set_.source_Storage_storage_offset", simulated::set_storage);
  library.impl("set_.source_Storage", simulated::set_whole_storage);
  library.impl("set_.source_Tensor", simulated::set_tensor);
  library.impl("_local_scalar_dense", simulated::local_scalar);
  library.impl("record_stream", simulated::record_stream);
  library.impl("_fused_sdp_choice", simulated::math_attention);
  library.impl("copy_", simulated::copy_);
}
