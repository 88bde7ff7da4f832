// What transports have in common.
#include "narrowgauge/transport.hpp"

#include "narrowgauge/error.hpp"

namespace ng {

std::shared_ptr<Transport> Transport::on(const Stream& stream) {
  throw InvalidArgument(concat("the transport, ", name(),
                               ", carries host memory; expected no stream, got one of cuda:", stream.device()));
}

}  // namespace ng
