// Whether parts of matrices in a CPU's memory are still what copies of them hold. Bound by
// kernels/cpu/samples.py, whose structure this is.

struct Sample {
  const char *data, *seen;  // the elements of `seen` lie side by side
  int64_t rows, columns;
  int64_t row_stride, column_stride, size;  // of `data`, in bytes
};

namespace {

// No branch within: the reads from a large matrix, each from a cache line of its own, overlap.
template <class Word>
bool differs(const Sample& s) {
  const char* seen = s.seen;
  Word difference = 0;
  for (int64_t i = 0; i < s.rows; ++i) {
    const char* row = s.data + i * s.row_stride;
    for (int64_t j = 0; j < s.columns; ++j, seen += sizeof(Word)) {
      Word now, then;
      std::memcpy(&now, row + j * s.column_stride, sizeof now);
      std::memcpy(&then, seen, sizeof then);
      difference |= now ^ then;
    }
  }
  return difference != 0;
}

}  // namespace

extern "C" void falqon_unchanged(const Sample* samples, int64_t count, int64_t* unchanged) {
  *unchanged = 1;
  for (int64_t i = 0; i < count; ++i) {
    const Sample& s = samples[i];
    const bool found = s.size == 1   ? differs<uint8_t>(s)
                       : s.size == 2 ? differs<uint16_t>(s)
                       : s.size == 4 ? differs<uint32_t>(s)
                                     : differs<uint64_t>(s);
    if (found) {
      *unchanged = 0;
      return;
    }
  }
}
