// Which tokens a run has in each stream.
#include "stream.h"

#include "program.h"

namespace nm {
namespace {

void append(Tokens& t, size_t sequence, size_t position) {
  t.sequence.push_back(static_cast<uint32_t>(sequence));
  t.position.push_back(static_cast<uint32_t>(position));
}

void end_sequence(Tokens& t) { t.starts.push_back(static_cast<uint32_t>(t.position.size())); }

template <class T>
void real_tokens(const T* mask, size_t batch, Tokens& t) {
  for (size_t b = 0; b < batch; ++b) {
    for (size_t s = 0; s < t.length; ++s)
      if (mask[b * t.length + s] != 0) append(t, b, s);
    end_sequence(t);
  }
}

}  // namespace

std::vector<Stream> default_streams() {
  std::vector<Stream> streams(kDefaultStreams);
  streams[kTokens].name = "tokens";
  streams[kFirstTokens].name = "first", streams[kFirstTokens].kind = Stream::kFirst;
  streams[kClassTokens].name = "tokens1", streams[kClassTokens].kind = Stream::kPrepended;
  return streams;
}

Tokens all_tokens(size_t batch, size_t length) {
  Tokens t;
  t.length = length;
  t.count = batch * length;
  t.sequence.resize(t.count);
  t.position.resize(t.count);
  t.starts.push_back(0);
  for (size_t b = 0, i = 0; b < batch; ++b) {
    for (size_t s = 0; s < length; ++s, ++i) {
      t.sequence[i] = static_cast<uint32_t>(b);
      t.position[i] = static_cast<uint32_t>(s);
    }
    t.starts.push_back(static_cast<uint32_t>(i));
  }
  return t;
}

Tokens masked_tokens(const char* what, const Array& mask, size_t batch, size_t length) {
  check_array(what, mask, {DType::kI64, DType::kI32, DType::kBool, DType::kF32}, {batch, length});
  Tokens t;
  t.length = length;
  t.starts.push_back(0);
  switch (mask.dtype) {
    case DType::kI64: real_tokens(mask.as<int64_t>(), batch, t); break;
    case DType::kI32: real_tokens(mask.as<int32_t>(), batch, t); break;
    case DType::kF32: real_tokens(mask.as<float>(), batch, t); break;
    default: real_tokens(mask.as<uint8_t>(), batch, t); break;
  }
  t.count = t.position.size();
  return t;
}

size_t following_length(Stream::Kind kind, size_t of) {
  switch (kind) {
    case Stream::kFirst: return 1;
    case Stream::kRest: return of ? of - 1 : 0;
    case Stream::kPrepended: return of + 1;
    default: return of;
  }
}

Tokens following_tokens(Stream::Kind kind, const Tokens& of) {
  const size_t batch = of.starts.size() - 1;
  if (kind == Stream::kFirst) return all_tokens(batch, 1);
  Tokens t;
  t.length = following_length(kind, of.length);
  t.starts.push_back(0);
  for (size_t b = 0; b < batch; ++b) {
    if (kind == Stream::kPrepended) append(t, b, 0);
    for (size_t i = of.starts[b]; i < of.starts[b + 1]; ++i) {
      if (kind == Stream::kPrepended) append(t, b, of.position[i] + size_t{1});
      else if (of.position[i]) append(t, b, of.position[i] - size_t{1});
    }
    end_sequence(t);
  }
  t.count = t.position.size();
  return t;
}

}  // namespace nm
