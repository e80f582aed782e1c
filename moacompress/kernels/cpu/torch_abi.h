// libtorch as the operators see it: the functions of its stable C ABI that they call, and above them an owning tensor, errors,
// tasks on torch's threads, and the registration of operators.
//
// The functions are declared here and found in the torch that is loaded, 2.10 or later, so a build needs no torch.
// tests/kernels/test_torch_abi.py holds the declarations against the headers of the installed torch.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

struct AtenTensorOpaque;
struct TorchLibraryOpaque;
struct StableListOpaque;

// An argument or a result of an operator: the bits of a number, a handle that its receiver owns, or null for what is not given.
using StableIValue = uint64_t;

#pragma GCC visibility push(default)
extern "C" {
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_dtype_uint8();
int32_t aoti_torch_dtype_int16();
int32_t aoti_torch_dtype_int32();
int32_t aoti_torch_dtype_int64();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float64();

// These return 0, or another number where they failed.
int32_t aoti_torch_new_tensor_handle(AtenTensorOpaque* tensor, AtenTensorOpaque** other);
int32_t aoti_torch_delete_tensor_object(AtenTensorOpaque* tensor);
int32_t aoti_torch_get_device_type(AtenTensorOpaque* tensor, int32_t* type);
int32_t aoti_torch_get_dtype(AtenTensorOpaque* tensor, int32_t* dtype);
int32_t aoti_torch_get_dim(AtenTensorOpaque* tensor, int64_t* dims);
int32_t aoti_torch_get_size(AtenTensorOpaque* tensor, int64_t dim, int64_t* size);
int32_t aoti_torch_get_stride(AtenTensorOpaque* tensor, int64_t dim, int64_t* stride);
int32_t aoti_torch_get_numel(AtenTensorOpaque* tensor, int64_t* numbers);
int32_t aoti_torch_is_contiguous(AtenTensorOpaque* tensor, bool* contiguous);
int32_t torch_get_const_data_ptr(AtenTensorOpaque* tensor, const void** data);
int32_t torch_get_mutable_data_ptr(AtenTensorOpaque* tensor, void** data);
int32_t aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device_type,
                                 int32_t device_index, AtenTensorOpaque** made);
int32_t aoti_torch_copy_(AtenTensorOpaque* to, AtenTensorOpaque* from, int32_t non_blocking);

int32_t torch_list_size(StableListOpaque* list, size_t* size);
int32_t torch_list_get_item(StableListOpaque* list, size_t index, StableIValue* item);
int32_t torch_delete_list(StableListOpaque* list);

int32_t torch_get_num_threads(uint32_t* threads);
int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

int32_t aoti_torch_library_init_fragment(const char* name, const char* file, uint32_t line, TorchLibraryOpaque** library);
int32_t aoti_torch_library_init_impl(const char* name, const char* key, const char* file, uint32_t line, TorchLibraryOpaque** library);
int32_t aoti_torch_library_def(TorchLibraryOpaque* library, const char* schema);
int32_t torch_library_impl(TorchLibraryOpaque* library, const char* name, void (*kernel)(StableIValue*, uint64_t, uint64_t),
                           uint64_t abi);
int32_t aoti_torch_delete_library_object(TorchLibraryOpaque* library);

// Why the last call of this thread failed. Of torch 2.13 and later; null before.
[[gnu::weak]] const char* torch_exception_get_what_without_backtrace();
}
#pragma GCC visibility pop

namespace moacompress {

// The version of the ABI whose conventions `Box` follows: 2.10. A byte each of major and minor.
constexpr uint64_t TORCH_ABI = uint64_t(2) << 56 | uint64_t(10) << 48;

// Throws what becomes a RuntimeError in Python.
template <class... Parts> [[noreturn, gnu::cold, gnu::noinline]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

[[noreturn, gnu::cold, gnu::noinline]] inline void fail_call(const char* function) {
  const char* reason = torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : nullptr;
  fail(reason && *reason ? reason : "torch gave no reason", " (", function, ")");
}

// Refuses what the caller gave; the parts after the condition are the message.
#define REQUIRE(condition, ...)                                                \
  do {                                                                         \
    if (__builtin_expect(!(condition), false)) ::moacompress::fail(__VA_ARGS__); \
  } while (false)

// Calls a function of the ABI, and fails where it does.
#define TORCH_CALL(function, ...)                                                               \
  do {                                                                                          \
    if (__builtin_expect(function(__VA_ARGS__) != 0, false)) ::moacompress::fail_call(#function); \
  } while (false)

// The dtypes that operators know; `Other` is any other.
enum class ScalarType { Byte, Short, Int, Long, Half, BFloat16, Float, Double, Other };

// Torch's numbers of them, in their order. They are no part of the ABI, so they are asked for, once.
inline const int32_t* dtype_numbers() {
  static const int32_t numbers[int(ScalarType::Other)] = {
      aoti_torch_dtype_uint8(),   aoti_torch_dtype_int16(),    aoti_torch_dtype_int32(),   aoti_torch_dtype_int64(),
      aoti_torch_dtype_float16(), aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float32(), aoti_torch_dtype_float64()};
  return numbers;
}

// A reference to a tensor of torch; a copy is one more to the same tensor.
class Tensor {
 public:
  explicit Tensor(AtenTensorOpaque* owned) : handle_(owned) {}
  Tensor(const Tensor& other) { TORCH_CALL(aoti_torch_new_tensor_handle, other.handle_, &handle_); }
  Tensor(Tensor&& other) noexcept : handle_(other.release()) {}
  Tensor& operator=(Tensor other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);  // a destructor has nobody to tell that it failed
  }

  AtenTensorOpaque* get() const { return handle_; }
  AtenTensorOpaque* release() noexcept { return std::exchange(handle_, nullptr); }

  int64_t dim() const { return asked<int64_t>("aoti_torch_get_dim", aoti_torch_get_dim); }
  int64_t numel() const { return asked<int64_t>("aoti_torch_get_numel", aoti_torch_get_numel); }
  int64_t size(int64_t dim) const { return asked<int64_t>("aoti_torch_get_size", aoti_torch_get_size, dim); }
  int64_t stride(int64_t dim) const { return asked<int64_t>("aoti_torch_get_stride", aoti_torch_get_stride, dim); }
  bool is_contiguous() const { return asked<bool>("aoti_torch_is_contiguous", aoti_torch_is_contiguous); }
  const void* const_data_ptr() const { return asked<const void*>("torch_get_const_data_ptr", torch_get_const_data_ptr); }
  void* mutable_data_ptr() const { return asked<void*>("torch_get_mutable_data_ptr", torch_get_mutable_data_ptr); }
  int32_t dtype_number() const { return asked<int32_t>("aoti_torch_get_dtype", aoti_torch_get_dtype); }
  bool is_cpu() const {
    static const int32_t cpu = aoti_torch_device_type_cpu();
    return asked<int32_t>("aoti_torch_get_device_type", aoti_torch_get_device_type) == cpu;
  }
  ScalarType scalar_type() const {
    const int32_t number = dtype_number(), *known = dtype_numbers();
    int type = 0;
    while (type < int(ScalarType::Other) && known[type] != number) type++;
    return ScalarType(type);
  }

 private:
  template <class Found, class Function, class... More> Found asked(const char* name, Function* function, More... more) const {
    Found found{};
    if (__builtin_expect(function(handle_, more..., &found) != 0, false)) fail_call(name);
    return found;
  }

  AtenTensorOpaque* handle_ = nullptr;
};

// A tensor on the CPU, not initialised. `dtype` is torch's number of it.
inline Tensor new_strided(int32_t dtype, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  AtenTensorOpaque* made = nullptr;
  TORCH_CALL(aoti_torch_empty_strided, int64_t(sizes.size()), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &made);
  return Tensor(made);
}

inline Tensor new_contiguous(int32_t dtype, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i] > 1 ? sizes[i] : 1) strides[i] = stride;
  return new_strided(dtype, sizes, strides);
}

// The same numbers, contiguous: the tensor itself, if it is that.
inline Tensor contiguous(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  std::vector<int64_t> sizes(size_t(tensor.dim()));
  for (size_t i = 0; i < sizes.size(); i++) sizes[i] = tensor.size(int64_t(i));
  Tensor made = new_contiguous(tensor.dtype_number(), sizes);
  TORCH_CALL(aoti_torch_copy_, made.get(), tensor.get(), 0);
  return made;
}

inline int num_threads() {
  uint32_t threads = 0;
  TORCH_CALL(torch_get_num_threads, &threads);
  return int(threads);
}

// Calls `body(begin, end, context)` for parts of [0, count) on torch's threads. It must not throw.
inline void parallel_for(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
  TORCH_CALL(torch_parallel_for, 0, count, 1, body, context);
}

// How a value of C++ goes through a StableIValue: `take` is given one to own, `give` returns one that the receiver owns.
template <class T> struct Box;

template <> struct Box<int64_t> {
  static int64_t take(StableIValue value) { return int64_t(value); }
  static StableIValue give(int64_t value) { return StableIValue(value); }
};

template <> struct Box<bool> {
  static bool take(StableIValue value) { return (value & 0xff) != 0; }
};

template <> struct Box<double> {
  static double take(StableIValue value) {
    double found;
    static_assert(sizeof(found) == sizeof(value));
    std::memcpy(&found, &value, sizeof(found));
    return found;
  }
};

template <> struct Box<Tensor> {
  static Tensor take(StableIValue value) { return Tensor(reinterpret_cast<AtenTensorOpaque*>(value)); }
  static StableIValue give(Tensor value) { return reinterpret_cast<StableIValue>(value.release()); }
};

// Null, or the address of a value that torch made with `new`.
template <class T> struct Box<std::optional<T>> {
  static std::optional<T> take(StableIValue value) {
    const std::unique_ptr<StableIValue> held(reinterpret_cast<StableIValue*>(value));
    if (!held) return std::nullopt;
    return Box<T>::take(*held);
  }
};

template <class T> struct Box<std::vector<T>> {
  static std::vector<T> take(StableIValue value) {
    const auto destroy = [](StableListOpaque* list) { torch_delete_list(list); };
    const std::unique_ptr<StableListOpaque, decltype(destroy)> list(reinterpret_cast<StableListOpaque*>(value), destroy);
    size_t size = 0;
    TORCH_CALL(torch_list_size, list.get(), &size);
    std::vector<T> found;
    found.reserve(size);
    for (size_t i = 0; i < size; i++) {
      StableIValue item;
      TORCH_CALL(torch_list_get_item, list.get(), i, &item);
      found.push_back(Box<T>::take(item));
    }
    return found;
  }
};

// What a function returns, as the results of an operator.
template <class T> struct Results {
  static constexpr uint64_t COUNT = 1;
  static void put(T value, StableIValue* stack) { stack[0] = Box<T>::give(std::move(value)); }
};

template <class... T> struct Results<std::tuple<T...>> {
  static constexpr uint64_t COUNT = sizeof...(T);
  static void put(std::tuple<T...> values, StableIValue* stack) {
    std::apply([&](T&... value) { ((*stack++ = Box<T>::give(std::move(value))), ...); }, values);
  }
};

template <> struct Results<void> {
  static constexpr uint64_t COUNT = 0;
};

// A function as the kernel of an operator: takes its arguments from a stack and leaves its results there.
template <auto function> struct Boxed;

template <class Out, class... In, Out (*function)(In...)> struct Boxed<function> {
  static void call(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
    REQUIRE(inputs == sizeof...(In) && outputs == Results<Out>::COUNT, "an operator of ", inputs, " arguments and ", outputs,
            " results is registered with a function of ", sizeof...(In), " and ", Results<Out>::COUNT);
    run(stack, std::index_sequence_for<In...>());
  }

 private:
  template <size_t... i> static void run(StableIValue* stack, std::index_sequence<i...>) {
    if constexpr (Results<Out>::COUNT == 0) function(Box<In>::take(stack[i])...);
    else Results<Out>::put(function(Box<In>::take(stack[i])...), stack);
  }
};

// An operator: its schema, which begins with its name, and its kernel on the CPU.
struct Operator {
  const char* schema;
  void (*kernel)(StableIValue*, uint64_t, uint64_t);
};

// Whether every operator was registered. What kept one from it goes to stderr: an exception while a library is loaded would end the
// process.
inline bool& all_registered() {
  static bool all = true;
  return all;
}

// Operators of a namespace of torch's, registered as long as this lives.
class Operators {
 public:
  Operators(const char* space, std::initializer_list<Operator> operators, const char* file = __builtin_FILE(),
            uint32_t line = __builtin_LINE()) {
    try {
      TORCH_CALL(aoti_torch_library_init_fragment, space, file, line, &schemas_.handle);
      TORCH_CALL(aoti_torch_library_init_impl, space, "CPU", file, line, &kernels_.handle);
      for (const Operator& each : operators) {
        TORCH_CALL(aoti_torch_library_def, schemas_.handle, each.schema);
        const std::string name(each.schema, std::strcspn(each.schema, "("));
        TORCH_CALL(torch_library_impl, kernels_.handle, name.c_str(), each.kernel, TORCH_ABI);
      }
    } catch (const std::exception& problem) {
      all_registered() = false;
      std::fprintf(stderr, "%s: torch refused the operators of %s: %s\n", file, space, problem.what());
    }
  }

 private:
  struct Library {
    TorchLibraryOpaque* handle = nullptr;
    Library() = default;
    Library(const Library&) = delete;
    Library& operator=(const Library&) = delete;
    ~Library() {
      if (handle) aoti_torch_delete_library_object(handle);
    }
  };

  Library schemas_, kernels_;
};

}  // namespace moacompress
