// Streams of tokens: the sequences of a run seen from several sides, all of one batch.
//
// A stream is read from inputs whose second axis are its tokens, with a mask of its own that drops padding, or it
// follows from another: its first tokens, the tokens behind the first, or it with a token before each sequence.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace nm {

struct Stream {
  enum Kind { kInput, kFirst, kRest, kPrepended };
  std::string name;
  Kind kind = kInput;
  size_t of = 0;         // what it follows from, itself for kInput
  bool used = false;     // by a buffer, or by a stream that follows from it
  int64_t slot = -1;     // of kInput: the first input slot that it is read from
  bool prepended = false;  // some stream has a token before each of its sequences

  bool input() const { return kind == kInput; }
};

// The streams that every program has; the first tokens of all streams are one, as each has one for each sequence.
enum : size_t { kTokens, kFirstTokens, kClassTokens, kDefaultStreams };
constexpr size_t kMostStreams = 64, kMostStreamName = 64;
std::vector<Stream> default_streams();

// The real tokens of a run in one stream.
struct Tokens {
  size_t length = 0;               // of the padded sequences
  size_t count = 0;
  std::vector<uint32_t> starts;    // [B + 1]
  std::vector<uint32_t> sequence;  // [count]
  std::vector<uint32_t> position;  // [count] position in the padded sequence

  // Whether the token at position 0 of a sequence is real.
  bool has_first(size_t of) const { return starts[of] < starts[of + 1] && position[starts[of]] == 0; }
};

struct Array;
Tokens all_tokens(size_t batch, size_t length);
Tokens masked_tokens(const char* what, const Array& mask, size_t batch, size_t length);
// The tokens of a stream that follows from one of these.
Tokens following_tokens(Stream::Kind kind, const Tokens& of);
size_t following_length(Stream::Kind kind, size_t of);

}  // namespace nm
