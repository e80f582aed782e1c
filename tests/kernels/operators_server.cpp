// The kernels' operators without torch, called through a pipe: what `emulated.py` asks for is read from stdin and answered on stdout.
// So a processor that only an emulator has runs the tests of the operators, whose tensors stay where Python runs.
//
// This stands in for torch: the functions of its C ABI over tensors of the simplest kind. New tensors are filled with NaN.
#include <cstdlib>
#include <functional>
#include <map>
#include <thread>

#include "../../moacompress/kernels/cpu/torch_abi.h"

extern "C" bool moacompress_set_isa(const char* name);
extern "C" const char* moacompress_isa();

struct AtenTensorOpaque {
  std::shared_ptr<std::vector<char>> memory;
  int32_t dtype;
  std::vector<int64_t> sizes, strides;
  char* data() const { return memory->data(); }
};
struct TorchLibraryOpaque {};
struct StableListOpaque {
  std::vector<StableIValue> items;
};

namespace {

typedef void (*Kernel)(StableIValue*, uint64_t, uint64_t);
std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> found;
  return found;
}
uint32_t threads = 1;

// As torch numbers them.
constexpr int32_t UINT8 = 0, INT8 = 1, INT16 = 2, INT32 = 3, INT64 = 4, FLOAT16 = 5, FLOAT32 = 6, FLOAT64 = 7, BOOL = 11, BFLOAT16 = 15;
int64_t bytes_of(int32_t dtype) {
  switch (dtype) {
    case UINT8: case INT8: case BOOL: return 1;
    case INT16: case FLOAT16: case BFLOAT16: return 2;
    case INT32: case FLOAT32: return 4;
    default: return 8;
  }
}

// Numbers from the first to the last one, those between rows too.
int64_t span_of(const AtenTensorOpaque& t) {
  int64_t last = 0;
  for (size_t i = 0; i < t.sizes.size(); i++) {
    if (t.sizes[i] == 0) return 0;
    last += (t.sizes[i] - 1) * t.strides[i];
  }
  return last + 1;
}

void give_memory(AtenTensorOpaque& t) {
  t.memory = std::make_shared<std::vector<char>>(size_t(span_of(t) * bytes_of(t.dtype) + 1), char(0xff));
}

// Calls `each` with where every number is, in rows of the last dimension's order.
void for_numbers(const AtenTensorOpaque& t, const std::function<void(char*)>& each, size_t dim = 0, int64_t at = 0) {
  if (dim == t.sizes.size()) return each(t.data() + at * bytes_of(t.dtype));
  for (int64_t i = 0; i < t.sizes[dim]; i++) for_numbers(t, each, dim + 1, at + i * t.strides[dim]);
}

}  // namespace

extern "C" {
int32_t aoti_torch_device_type_cpu() { return 0; }
int32_t aoti_torch_dtype_uint8() { return UINT8; }
int32_t aoti_torch_dtype_int16() { return INT16; }
int32_t aoti_torch_dtype_int32() { return INT32; }
int32_t aoti_torch_dtype_int64() { return INT64; }
int32_t aoti_torch_dtype_float16() { return FLOAT16; }
int32_t aoti_torch_dtype_bfloat16() { return BFLOAT16; }
int32_t aoti_torch_dtype_float32() { return FLOAT32; }
int32_t aoti_torch_dtype_float64() { return FLOAT64; }

int32_t aoti_torch_new_tensor_handle(AtenTensorOpaque* tensor, AtenTensorOpaque** other) { return *other = new AtenTensorOpaque(*tensor), 0; }
int32_t aoti_torch_delete_tensor_object(AtenTensorOpaque* tensor) { return delete tensor, 0; }
int32_t aoti_torch_get_device_type(AtenTensorOpaque*, int32_t* type) { return *type = 0, 0; }
int32_t aoti_torch_get_dtype(AtenTensorOpaque* tensor, int32_t* dtype) { return *dtype = tensor->dtype, 0; }
int32_t aoti_torch_get_dim(AtenTensorOpaque* tensor, int64_t* dims) { return *dims = int64_t(tensor->sizes.size()), 0; }
int32_t aoti_torch_get_size(AtenTensorOpaque* tensor, int64_t dim, int64_t* size) {
  if (dim < 0 || dim >= int64_t(tensor->sizes.size())) return 1;
  return *size = tensor->sizes[size_t(dim)], 0;
}
int32_t aoti_torch_get_stride(AtenTensorOpaque* tensor, int64_t dim, int64_t* stride) {
  if (dim < 0 || dim >= int64_t(tensor->sizes.size())) return 1;
  return *stride = tensor->strides[size_t(dim)], 0;
}
int32_t aoti_torch_get_numel(AtenTensorOpaque* tensor, int64_t* numbers) {
  *numbers = 1;
  for (const int64_t size : tensor->sizes) *numbers *= size;
  return 0;
}
int32_t aoti_torch_is_contiguous(AtenTensorOpaque* tensor, bool* contiguous) {
  int64_t numbers = 0, stride = 1;
  aoti_torch_get_numel(tensor, &numbers);
  *contiguous = true;
  for (size_t i = tensor->sizes.size(); i-- > 0; stride *= tensor->sizes[i])
    if (numbers && tensor->sizes[i] != 1 && tensor->strides[i] != stride) *contiguous = false;
  return 0;
}
int32_t torch_get_const_data_ptr(AtenTensorOpaque* tensor, const void** data) { return *data = tensor->data(), 0; }
int32_t torch_get_mutable_data_ptr(AtenTensorOpaque* tensor, void** data) { return *data = tensor->data(), 0; }
int32_t aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t, int32_t,
                                 AtenTensorOpaque** made) {
  *made = new AtenTensorOpaque{nullptr, dtype, {sizes, sizes + dims}, {strides, strides + dims}};
  give_memory(**made);
  return 0;
}
int32_t aoti_torch_copy_(AtenTensorOpaque* to, AtenTensorOpaque* from, int32_t) {
  std::vector<char*> numbers;
  for_numbers(*from, [&](char* at) { numbers.push_back(at); });
  size_t next = 0;
  for_numbers(*to, [&](char* at) { std::memcpy(at, numbers[next++], size_t(bytes_of(to->dtype))); });
  return 0;
}

int32_t torch_list_size(StableListOpaque* list, size_t* size) { return *size = list->items.size(), 0; }
int32_t torch_list_get_item(StableListOpaque* list, size_t index, StableIValue* item) { return *item = list->items[index], 0; }
int32_t torch_delete_list(StableListOpaque* list) { return delete list, 0; }

int32_t torch_get_num_threads(uint32_t* count) { return *count = threads, 0; }
int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  std::vector<std::thread> pool;
  for (int64_t i = begin; i < end; i++) pool.emplace_back(body, i, i + 1, context);
  for (std::thread& thread : pool) thread.join();
  return 0;
}

int32_t aoti_torch_library_init_fragment(const char*, const char*, uint32_t, TorchLibraryOpaque** library) {
  return *library = new TorchLibraryOpaque, 0;
}
int32_t aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, TorchLibraryOpaque** library) {
  return *library = new TorchLibraryOpaque, 0;
}
int32_t aoti_torch_library_def(TorchLibraryOpaque*, const char*) { return 0; }
int32_t torch_library_impl(TorchLibraryOpaque*, const char* name, Kernel kernel, uint64_t) { return kernels()[name] = kernel, 0; }
int32_t aoti_torch_delete_library_object(TorchLibraryOpaque* library) { return delete library, 0; }
}

namespace {

void read(void* to, size_t bytes) {
  if (std::fread(to, 1, bytes, stdin) != bytes) std::exit(0);  // whoever asked has ended
}
template <class T> T read() {
  T found;
  read(&found, sizeof found);
  return found;
}
std::string read_text() {
  std::string found(read<uint64_t>(), ' ');
  read(found.data(), found.size());
  return found;
}
void write(const void* from, size_t bytes) {
  if (std::fwrite(from, 1, bytes, stdout) != bytes) std::exit(1);
}
template <class T> void write(const T& value) { write(&value, sizeof value); }
void write_text(const std::string& text) {
  write(uint64_t(text.size()));
  write(text.data(), text.size());
}

// A tensor of the arguments, with the bytes that came.
struct Given {
  AtenTensorOpaque tensor;
  std::vector<char> before;
};

// Reads an argument of a tag each; its tensors are noted.
StableIValue read_argument(std::vector<Given>& given) {
  switch (read<char>()) {
    case 'N': return 0;
    case 'O': {
      auto* value = new StableIValue;
      *value = read_argument(given);
      return reinterpret_cast<StableIValue>(value);
    }
    case 'L': {
      auto* list = new StableListOpaque;
      for (uint64_t left = read<uint64_t>(); left > 0; left--) list->items.push_back(read_argument(given));
      return reinterpret_cast<StableIValue>(list);
    }
    case 'T': {
      AtenTensorOpaque tensor;
      tensor.dtype = read<int32_t>();
      tensor.sizes.resize(read<uint64_t>());
      tensor.strides.resize(tensor.sizes.size());
      read(tensor.sizes.data(), 8 * tensor.sizes.size());
      read(tensor.strides.data(), 8 * tensor.sizes.size());
      give_memory(tensor);
      read(tensor.data(), size_t(span_of(tensor) * bytes_of(tensor.dtype)));
      given.push_back({tensor, *tensor.memory});
      return reinterpret_cast<StableIValue>(new AtenTensorOpaque(tensor));
    }
    default: return read<uint64_t>();  // the bits of a number
  }
}

void write_tensor(const AtenTensorOpaque& tensor) {
  write(tensor.dtype);
  write(uint64_t(tensor.sizes.size()));
  write(tensor.sizes.data(), 8 * tensor.sizes.size());
  write(tensor.strides.data(), 8 * tensor.sizes.size());
  write(tensor.data(), size_t(span_of(tensor) * bytes_of(tensor.dtype)));
}

// Calls an operator: the answer is what is wrong or nothing, its results, and the bytes of every tensor that it has changed.
void answer() {
  const std::string name = read_text(), results = read_text();  // of each result T or i
  threads = read<uint32_t>();
  std::vector<Given> given;
  std::vector<StableIValue> stack(read<uint64_t>());
  const uint64_t inputs = stack.size();
  for (StableIValue& value : stack) value = read_argument(given);
  stack.resize(inputs > results.size() ? inputs : results.size());
  try {
    if (!kernels().count(name)) moacompress::fail("no operator is called ", name);
    kernels()[name](stack.data(), inputs, results.size());
  } catch (const std::exception& problem) {
    return write_text(problem.what());
  }
  write_text("");
  for (size_t i = 0; i < results.size(); i++) {
    if (results[i] != 'T') {
      write(stack[i]);
      continue;
    }
    const std::unique_ptr<AtenTensorOpaque> tensor(reinterpret_cast<AtenTensorOpaque*>(stack[i]));
    write_tensor(*tensor);
  }
  for (const Given& each : given) {
    const bool changed = each.before != *each.tensor.memory;
    write(changed);
    if (changed) write(each.tensor.data(), each.before.size() - 1);
  }
}

}  // namespace

int main() {
  for (;; std::fflush(stdout)) {
    switch (read<char>()) {
      case 'b': write_text(moacompress_isa()); break;
      case 's': write(moacompress_set_isa(read_text().c_str())); break;
      default: answer();
    }
  }
}
