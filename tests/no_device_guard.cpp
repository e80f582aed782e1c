// Gives PyTorch a guard for devices of the type XLA, which it has not without that package: one that does nothing.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
C10_REGISTER_GUARD_IMPL(XLA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::XLA>)
}
