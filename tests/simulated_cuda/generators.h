// Random generators of the device: the CPU's, under another name.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Generator.h>
#include <ATen/core/ivalue.h>

namespace simulated {

at::Generator new_generator(int device);
const at::Generator& default_generator(int device);

// What the CPU's kernel gets for the generator of a call, which may be none.
c10::IValue host_generator(const c10::IValue& given, int device);

}  // namespace simulated
