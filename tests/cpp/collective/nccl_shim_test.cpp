// Our declarations of NCCL beside nccl.h, where that is installed; and what is said where no NCCL is.
#include "collective/shim/nccl.hpp"

#include <gtest/gtest.h>

#include <cstddef>
#include <type_traits>

#include "narrowgauge/error.hpp"
#include "narrowgauge/transport_nccl.hpp"

#ifdef NARROWGAUGE_NCCL_H
#include <nccl.h>

namespace ng::nccl {
namespace {

template <typename Ours, typename Theirs>
constexpr bool alike =
    sizeof(Ours) == sizeof(Theirs) && std::is_floating_point_v<Ours> == std::is_floating_point_v<Theirs>;

template <typename Ours, typename Theirs>
constexpr bool same_call = false;
template <typename R, typename... A, typename S, typename... B>
constexpr bool same_call<R (*)(A...), S (*)(B...)> = [] {
  if constexpr (sizeof...(A) == sizeof...(B)) {
    return alike<R, S> && (alike<A, B> && ...);
  } else {
    return false;
  }
}();

#define NG_COMPARE(result, name, parameters) static_assert(same_call<decltype(Nccl::name), decltype(&::name)>, #name);
NG_NCCL_FUNCTIONS(NG_COMPARE)
#undef NG_COMPARE

template <typename A, typename B>
constexpr bool same_value(A a, B b) {
  return static_cast<long long>(a) == static_cast<long long>(b);
}

static_assert(same_value(Result::success, ncclSuccess));
static_assert(same_value(Result::unhandled_cuda_error, ncclUnhandledCudaError));
static_assert(same_value(Result::system_error, ncclSystemError));
static_assert(same_value(Result::internal_error, ncclInternalError));
static_assert(same_value(Result::invalid_argument, ncclInvalidArgument));
static_assert(same_value(Result::invalid_usage, ncclInvalidUsage));
static_assert(same_value(Result::remote_error, ncclRemoteError));
static_assert(same_value(Result::in_progress, ncclInProgress));
static_assert(same_value(DataType::uint8, ncclUint8));
static_assert(sizeof(UniqueId) == sizeof(ncclUniqueId) && NCCL_UNIQUE_ID_BYTES == sizeof(UniqueId));
static_assert(offsetof(Config, magic) == offsetof(ncclConfig_t, magic));
static_assert(offsetof(Config, version) == offsetof(ncclConfig_t, version));
static_assert(offsetof(Config, blocking) == offsetof(ncclConfig_t, blocking));
static_assert(offsetof(Config, net_name) == offsetof(ncclConfig_t, netName));
static_assert(offsetof(Config, split_share) == offsetof(ncclConfig_t, splitShare));
static_assert(NCCL_CONFIG_UNDEF_INT == INT_MIN);
static_assert(NCCL_VERSION(2, 18, 0) == kMinimumVersion);

}  // namespace
}  // namespace ng::nccl
#endif

namespace ng {
namespace {

TEST(NcclShim, WithoutNcclAReasonIsGiven) {
  if (nccl::library() != nullptr) {
    EXPECT_EQ(why_no_nccl(), "");
    EXPECT_GE(nccl_version(), nccl::kMinimumVersion);
    return;
  }
  EXPECT_NE(why_no_nccl(), "");
  const auto message = [](const auto& call) -> std::string {
    try {
      call();
    } catch (const TransportError& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_NE(message([] { nccl_version(); }).find(why_no_nccl()), std::string::npos);
  EXPECT_NE(message([] { nccl_unique_id(); }).find(why_no_nccl()), std::string::npos);
  EXPECT_NE(message([] { NcclTransport::create({}, 0, 1, 0); }).find(why_no_nccl()), std::string::npos);
}

}  // namespace
}  // namespace ng
