#include "generators.h"

#include "graphs.h"

namespace simulated {

struct GeneratorImpl : c10::GeneratorImpl {
  GeneratorImpl(int on, at::Generator of_host)
      : c10::GeneratorImpl(c10::Device(c10::DeviceType::CUDA, c10::DeviceIndex(on)),
                           c10::DispatchKeySet(c10::DispatchKey::CUDA)),
        host(std::move(of_host)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t) override { TORCH_CHECK(false, "offsets of generators are not simulated"); }
  uint64_t get_offset() const override { TORCH_CHECK(false, "offsets of generators are not simulated"); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_state(const c10::TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return host.unsafeGetGeneratorImpl()->get_state(); }
  GeneratorImpl* clone_impl() const override { return new GeneratorImpl(device_.index(), host.clone()); }
  at::Generator host;
};

at::Generator new_generator(int on) {
  return at::make_generator<GeneratorImpl>(on, at::make_generator<at::CPUGeneratorImpl>(c10::default_rng_seed_val));
}

const at::Generator& default_generator(int on) {
  static auto* made = new std::map<int, at::Generator>();
  Lock lock;
  if (on < 0) on = current_device();
  auto found = made->find(on);
  return found != made->end() ? found->second : made->emplace(on, new_generator(on)).first->second;
}

c10::IValue host_generator(const c10::IValue& given, int on) {
  bool is_capturing = current_stream(on).capture;
  if (!given.isNone()) {
    auto generator = given.toGenerator();
    TORCH_CHECK(generator.device().is_cuda(), "Expected a 'cuda' device type for generator but found 'cpu'");
    bool is_default = generator.unsafeGetGeneratorImpl() == default_generator(on).unsafeGetGeneratorImpl();
    TORCH_CHECK(!is_capturing || is_default,
                "Attempt to increase offset for a CUDA generator not in capture mode.");
    TORCH_CHECK(is_capturing || !is_default || device().captures.empty(),
                "Offset increment outside graph capture encountered unexpectedly.");
    return static_cast<GeneratorImpl*>(generator.unsafeGetGeneratorImpl())->host;
  }
  TORCH_CHECK(is_capturing || device().captures.empty(),
              "Offset increment outside graph capture encountered unexpectedly.");
  return static_cast<GeneratorImpl*>(default_generator(on).unsafeGetGeneratorImpl())->host;
}

}  // namespace simulated
