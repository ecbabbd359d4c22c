// JPEGs by libjpeg-turbo: the header, the pixels of a region, and lossless transcoding. Plain C functions that ctypes
// calls without Python's lock. They know neither torch nor Python, and keep no state between two calls.
//
// Only sound baseline files are accepted here. Everything else is refused, and the caller takes its general way:
// therefore a check that is too strict costs speed and nothing else.

#include <algorithm>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include <jpeglib.h>

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2001000
#error "libjpeg-turbo 2.1 or newer is needed"
#endif

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

using std::string_view;

constexpr uint8_t SOI = 0xD8, EOI = 0xD9, SOS = 0xDA, DQT = 0xDB, DRI = 0xDD, SOF0 = 0xC0, DHT = 0xC4, COM = 0xFE;
constexpr uint8_t APP0 = 0xE0, APP1 = 0xE1, APP2 = 0xE2, APP13 = 0xED, APP14 = 0xEE, APP15 = 0xEF;

// A decoder of the whole image looks for the end in so many bytes (decode.py).
constexpr size_t END_WITHIN = 64;
// Upsampling of chroma looks at the neighbours of a sample; two blocks are more than it needs.
constexpr int MARGIN = 16;

bool starts(string_view text, string_view with) { return text.substr(0, with.size()) == with; }

struct Header {
  int width = 0, height = 0, components = 0;
  int mcu_width = 8, mcu_height = 8;  // in pixels
  int orientation = 0;  // of EXIF; 0: none there
  int restart = 0;      // MCUs between two restart markers; 0: none
  size_t sides = 0;     // where the frame header has height and width
  size_t scan = 0;      // where the entropy-coded data begins
  size_t end = 0;       // and ends, at the marker EOI
  bool subsampled = false;

  int mcus_per_row() const { return (width + mcu_width - 1) / mcu_width; }
  int mcu_rows() const { return (height + mcu_height - 1) / mcu_height; }
};

// Big-endian or little-endian numbers in a block; the caller checks the bounds.
struct Numbers {
  string_view block;
  bool is_little = false;

  uint32_t at(size_t place, int bytes) const {
    uint32_t value = 0;
    for (int i = 0; i < bytes; ++i)
      value = value << 8 | static_cast<uint8_t>(block[place + (is_little ? bytes - 1 - i : i)]);
    return value;
  }
};

// Bytes of a number of a type in EXIF; 0 for types that Pillow does not know and skips.
uint64_t exif_bytes(uint32_t type) {
  constexpr uint8_t BYTES[] = {0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8};
  return type < sizeof(BYTES) ? BYTES[type] : 0;
}

// The orientation in an EXIF block (0x0112). Returns false for all that Pillow might understand in another way.
bool read_exif(string_view exif, int& orientation) {
  if (exif.size() < 14) return false;
  const bool is_little = starts(exif, string_view("II*\0", 4));
  if (!is_little && !starts(exif, string_view("MM\0*", 4))) return false;
  const Numbers numbers{exif, is_little};
  const size_t first = numbers.at(4, 4);
  if (first < 8 || first > exif.size() - 2) return false;
  const size_t entries = numbers.at(first, 2);
  if (first + 2 + 12 * entries + 4 > exif.size()) return false;
  bool is_seen = false;
  uint64_t total = 0;
  for (size_t i = 0; i < entries; ++i) {
    const size_t entry = first + 2 + 12 * i;
    const uint32_t tag = numbers.at(entry, 2), type = numbers.at(entry + 2, 2), count = numbers.at(entry + 4, 4);
    // Where a value leaves the block, Pillow skips it or all that follows, depending on its version.
    const uint64_t size = count * exif_bytes(type);
    if (size > 4) {
      total += size;
      if (total > exif.size() || numbers.at(entry + 8, 4) + size > exif.size()) return false;
    }
    // Pillow reads the resolution as it opens the file, and refuses it where the types are not these.
    if (tag == 0x011A && (type != 5 || count != 1)) return false;
    if (tag == 0x0128 && (type != 3 || count != 1)) return false;
    if (tag != 0x0112) continue;
    if (is_seen || type != 3 || count != 1) return false;
    is_seen = true;
    const uint32_t value = numbers.at(entry + 8, 2);
    orientation = 1 <= value && value <= 8 ? static_cast<int>(value) : 1;
  }
  return true;
}

// Whether Pillow gets through a block of Photoshop's resources: it ends well or in the middle of a number.
bool is_readable_photoshop(string_view block) {
  const Numbers numbers{block};
  size_t at = 14;
  while (at + 4 <= block.size() && block.substr(at, 4) == "8BIM") {
    at += 6;
    if (at > block.size()) return true;
    if (at == block.size()) return false;
    at += 1 + static_cast<uint8_t>(block[at]);
    at += at & 1;
    if (at + 4 > block.size()) return true;
    const size_t size = numbers.at(at, 4);
    at += 4 + size;
    at += at & 1;
  }
  return true;
}

// Whether a segment consists of whole quantization tables of 8 or 16 bits.
bool has_whole_tables(string_view segment) {
  while (!segment.empty()) {
    const size_t size = 1 + (static_cast<uint8_t>(segment[0]) < 16 ? 64 : 128);
    if (segment.size() < size) return false;
    segment.remove_prefix(size);
  }
  return true;
}

bool read_application(uint8_t marker, string_view segment, bool& has_exif, bool& has_xmp, Header& header) {
  if (marker == APP0 && starts(segment, "JFIF")) return segment.size() >= 12;
  if (marker == APP1 && starts(segment, string_view("Exif\0\0", 6))) {
    if (has_exif) return false;
    has_exif = true;
    return read_exif(segment.substr(6), header.orientation);
  }
  if (marker == APP1 && starts(segment, "http://ns.adobe.com/xap/1.0/"))
    has_xmp = has_xmp || segment.find("tiff:Orientation") != string_view::npos;
  if (marker == APP2 && starts(segment, "ICC_PROFILE")) return segment.size() >= 14;
  if (marker == APP2 && starts(segment, "MPF")) return false;
  if (marker == APP13 && starts(segment, "Photoshop 3.0")) return is_readable_photoshop(segment);
  if (marker == APP14 && starts(segment, "Adobe")) return segment.size() >= 12 && segment[11] != 0;
  return true;
}

bool read_frame(string_view segment, Header& header) {
  if (header.width != 0 || segment.size() < 6 || segment[0] != 8) return false;
  const Numbers numbers{segment};
  header.height = static_cast<int>(numbers.at(1, 2));
  header.width = static_cast<int>(numbers.at(3, 2));
  header.components = static_cast<uint8_t>(segment[5]);
  if (header.height == 0 || header.width == 0) return false;
  if (header.components != 1 && header.components != 3) return false;
  if (segment.size() != 6 + 3 * static_cast<size_t>(header.components)) return false;
  const int across = static_cast<uint8_t>(segment[7]) >> 4, down = segment[7] & 15;
  if (header.components == 1) return across == 1 && down == 1;
  if (across < 1 || across > 2 || down < 1 || down > 2 || segment[10] != 0x11 || segment[13] != 0x11) return false;
  header.mcu_width = 8 * across;
  header.mcu_height = 8 * down;
  header.subsampled = across > 1 || down > 1;
  return true;
}

// Reads everything up to the end. Returns false unless this is one baseline scan of 8-bit grey or YCbCr that ends where
// the file does, with a header that Pillow reads too.
bool read_header(string_view data, Header& header) {
  if (data.size() < 4 || data.size() > UINT32_MAX) return false;
  if (!starts(data, string_view("\xFF\xD8\xFF"))) return false;
  const Numbers numbers{data};
  bool has_exif = false, has_xmp = false;
  size_t at = 2;
  while (header.scan == 0) {
    if (at + 4 > data.size() || static_cast<uint8_t>(data[at]) != 0xFF) return false;
    const uint8_t marker = static_cast<uint8_t>(data[at + 1]);
    const size_t length = numbers.at(at + 2, 2);
    if (length < 2 || at + 2 + length > data.size()) return false;
    const string_view segment = data.substr(at + 4, length - 2);
    if (marker == SOF0) {
      header.sides = at + 5;
      if (!read_frame(segment, header)) return false;
    } else if (marker == SOS) {
      if (header.width == 0 || segment.size() != 4 + 2 * static_cast<size_t>(header.components)) return false;
      if (segment[0] != header.components) return false;
      header.scan = at + 2 + length;
    } else if (marker == DRI) {
      if (segment.size() != 2) return false;
      header.restart = static_cast<int>(numbers.at(at + 4, 2));
    } else if (APP0 <= marker && marker <= APP15) {
      if (!read_application(marker, segment, has_exif, has_xmp, header)) return false;
    } else if (marker == DQT) {
      if (!has_whole_tables(segment)) return false;
    } else if (marker != DHT && marker != COM) {
      return false;
    }
    at += 2 + length;
  }
  // Pillow takes the orientation from XMP if EXIF has none.
  if (header.orientation == 0) {
    if (has_xmp) return false;
    header.orientation = 1;
  }
  for (at = header.scan; (at = data.find('\xFF', at)) != string_view::npos && at + 1 < data.size(); at += 2) {
    const uint8_t marker = static_cast<uint8_t>(data[at + 1]);
    if (marker == 0 || (0xD0 <= marker && marker <= 0xD7)) continue;
    header.end = at;
    return marker == EOI && data.size() - at <= END_WITHIN;
  }
  return false;
}

// libjpeg

struct Errors {
  jpeg_error_mgr manager;
  jmp_buf jump;
};

[[noreturn]] void leave(j_common_ptr info) { longjmp(reinterpret_cast<Errors*>(info->err)->jump, 1); }

void count_warning(j_common_ptr info, int level) {
  if (level < 0) ++info->err->num_warnings;
}

void forget(j_common_ptr info) { info->err->num_warnings = 0; }

// Without jpeg_std_error, whose table of messages cannot be part of every shared library.
jpeg_error_mgr* quiet(Errors& errors) {
  std::memset(&errors, 0, sizeof(errors));
  errors.manager.error_exit = leave;
  errors.manager.emit_message = count_warning;
  errors.manager.output_message = [](j_common_ptr) {};
  errors.manager.format_message = [](j_common_ptr, char* text) { *text = 0; };
  errors.manager.reset_error_mgr = forget;
  return &errors.manager;
}

const uint8_t* bytes(string_view data) { return reinterpret_cast<const uint8_t*>(data.data()); }

struct Window {
  int top, left, height, width;
};

// Returns the side of an image that libjpeg decodes at 1 / scale of its size.
int scaled(int side, int scale) { return (side + scale - 1) / scale; }

// Writes the pixels of a window, RGB (height, width, 3). The window is one of the image at 1 / scale of its size.
// Returns false where libjpeg has an error or a warning. Rows are skipped from row 0 only (libjpeg-turbo's issue 915),
// and what lies below the window is decoded only `to_the_end`.
bool decode(string_view data, int whole_height, int whole_width, int scale, int margin, Window window,
            bool to_the_end, std::vector<uint8_t>& line, uint8_t* out) {
  const int columns = scaled(whole_width, scale);
  line.resize(3 * size_t(columns));
  Errors errors;
  jpeg_decompress_struct info;
  std::memset(&info, 0, sizeof(info));
  info.err = quiet(errors);
  if (setjmp(errors.jump)) {
    jpeg_destroy_decompress(&info);
    return false;
  }
  jpeg_create_decompress(&info);
  jpeg_mem_src(&info, bytes(data), data.size());
  jpeg_read_header(&info, TRUE);
  if (static_cast<int>(info.image_width) != whole_width || static_cast<int>(info.image_height) != whole_height)
    leave(reinterpret_cast<j_common_ptr>(&info));
  info.out_color_space = JCS_RGB;
  info.scale_num = 1;
  info.scale_denom = scale;
  jpeg_start_decompress(&info);
  JDIMENSION first = std::max(0, window.left - margin);
  JDIMENSION width = std::min(columns, window.left + window.width + margin) - first;
  // The next multiple of an MCU to the left is what libjpeg takes for `first`.
  if (first > 0 || static_cast<int>(width) < columns) jpeg_crop_scanline(&info, &first, &width);
  JSAMPROW row = line.data();
  const JDIMENSION skipped = std::max(0, window.top - margin);
  if (skipped > 0 && jpeg_skip_scanlines(&info, skipped) != skipped) leave(reinterpret_cast<j_common_ptr>(&info));
  const size_t from = 3 * (size_t(window.left) - first), count = 3 * size_t(window.width);
  for (int y = static_cast<int>(skipped); y < window.top + window.height; ++y) {
    if (jpeg_read_scanlines(&info, &row, 1) != 1) leave(reinterpret_cast<j_common_ptr>(&info));
    if (y >= window.top) std::memcpy(out + count * (y - window.top), row + from, count);
  }
  if (to_the_end) {
    while (info.output_scanline < info.output_height)
      if (jpeg_read_scanlines(&info, &row, 1) != 1) leave(reinterpret_cast<j_common_ptr>(&info));
    jpeg_finish_decompress(&info);
  }
  const bool is_sound = errors.manager.num_warnings == 0;
  jpeg_destroy_decompress(&info);
  return is_sound;
}

// A part of a JPEG, which is a JPEG itself: whole segments between restart markers. Its window has the pixels of the
// window of the whole. Needs segments that divide the rows of MCUs, all markers there and in their order.
bool cut_segments(string_view data, const Header& header, int margin, Window& window, int& height, int& width,
                  std::string& part) {
  if (header.restart == 0 || header.mcus_per_row() % header.restart != 0) return false;
  const int per_row = header.mcus_per_row() / header.restart, rows = header.mcu_rows();
  if (per_row == 1 && rows == 1) return false;
  std::vector<size_t> begins{header.scan};
  begins.reserve(size_t(per_row) * rows + 1);
  for (size_t at = header.scan; (at = data.find('\xFF', at)) < header.end; at += 2) {
    const uint8_t marker = static_cast<uint8_t>(data[at + 1]);
    if (marker == 0) continue;
    if (marker != 0xD0 + (begins.size() - 1) % 8 || begins.size() == size_t(per_row) * rows) return false;
    begins.push_back(at + 2);
  }
  if (begins.size() != size_t(per_row) * rows) return false;
  begins.push_back(header.end + 2);

  const int across = header.restart * header.mcu_width, down = header.mcu_height;
  const int top = std::max(0, window.top - margin) / down, left = std::max(0, window.left - margin) / across;
  const int bottom = (std::min(header.height, window.top + window.height + margin) + down - 1) / down;
  const int right = (std::min(header.width, window.left + window.width + margin) + across - 1) / across;
  height = std::min(header.height, bottom * down) - top * down;
  width = std::min(header.width, right * across) - left * across;
  window.top -= top * down;
  window.left -= left * across;

  part.assign(data.substr(0, header.scan));
  part[header.sides] = static_cast<char>(height >> 8);
  part[header.sides + 1] = static_cast<char>(height);
  part[header.sides + 2] = static_cast<char>(width >> 8);
  part[header.sides + 3] = static_cast<char>(width);
  int number = 0;
  for (int y = top; y < bottom; ++y) {
    for (int x = left; x < right; ++x) {
      const size_t i = size_t(y) * per_row + x;
      if (number > 0) part += {'\xFF', static_cast<char>(0xD0 + (number - 1) % 8)};
      part += data.substr(begins[i], begins[i + 1] - 2 - begins[i]);
      ++number;
    }
  }
  part += "\xFF\xD9";
  return true;
}

// MCUs between two restart markers: the divisor of a row that is nearest to 8, so that segments form columns.
int restart_interval(int mcus_per_row) {
  constexpr int ABOUT = 8, MOST = 16;
  int best = mcus_per_row;
  for (int each = 1; each <= std::min(MOST, mcus_per_row); ++each)
    if (mcus_per_row % each == 0 && each >= ABOUT / 2 && std::abs(each - ABOUT) < std::abs(best - ABOUT)) best = each;
  return best;
}

// The markers libjpeg writes by itself, from what it knows of the image.
bool is_own(const jpeg_marker_struct& marker) {
  const string_view text(reinterpret_cast<const char*>(marker.data), marker.data_length);
  return (marker.marker == APP0 && starts(text, string_view("JFIF\0", 5))) ||
         (marker.marker == APP14 && starts(text, "Adobe"));
}

// Whether libjpeg writes such a marker with the same content: JFIF without a thumbnail, Adobe of version 100 without
// flags.
bool is_written_alike(const jpeg_marker_struct& marker) {
  const string_view text(reinterpret_cast<const char*>(marker.data), marker.data_length);
  if (marker.marker == APP0) return text.size() == 14;
  return text.size() == 12 && text.substr(5, 6) == string_view("\0\x64\0\0\0\0", 6);
}

// Writes the same coefficients as one baseline scan into `out`. Returns its size, 0 where it cannot be done, or where
// something of the file would get lost.
size_t transcode(string_view data, uint8_t* out, size_t room) {
  if (room == 0) return 0;
  Errors errors;
  jpeg_decompress_struct from;
  jpeg_compress_struct to;
  jpeg_destination_mgr target;
  std::memset(&from, 0, sizeof(from));
  std::memset(&to, 0, sizeof(to));
  from.err = to.err = quiet(errors);
  if (setjmp(errors.jump)) {
    jpeg_destroy_compress(&to);
    jpeg_destroy_decompress(&from);
    return 0;
  }
  jpeg_create_decompress(&from);
  jpeg_create_compress(&to);
  jpeg_mem_src(&from, bytes(data), data.size());
  target.next_output_byte = out;
  target.free_in_buffer = room;
  target.init_destination = target.term_destination = [](j_compress_ptr) {};
  target.empty_output_buffer = [](j_compress_ptr full) -> boolean { leave(reinterpret_cast<j_common_ptr>(full)); };
  to.dest = &target;
  for (int marker = APP0; marker <= APP15; ++marker) jpeg_save_markers(&from, marker, 0xFFFF);
  jpeg_save_markers(&from, COM, 0xFFFF);
  jpeg_read_header(&from, TRUE);
  jvirt_barray_ptr* coefficients = jpeg_read_coefficients(&from);
  jpeg_copy_critical_parameters(&from, &to);
  to.write_JFIF_header = from.saw_JFIF_marker;
  to.write_Adobe_marker = from.saw_Adobe_marker;
  to.optimize_coding = TRUE;
  const int mcu_width = 8 * (from.num_components == 1 ? 1 : from.max_h_samp_factor);
  to.restart_interval = restart_interval((from.image_width + mcu_width - 1) / mcu_width);
  jpeg_write_coefficients(&to, coefficients);
  int own[256] = {};
  for (jpeg_saved_marker_ptr marker = from.marker_list; marker != nullptr; marker = marker->next) {
    if (!is_own(*marker)) {
      jpeg_write_marker(&to, marker->marker, marker->data, marker->data_length);
    } else if (++own[marker->marker] > 1 || !is_written_alike(*marker)) {
      leave(reinterpret_cast<j_common_ptr>(&from));
    }
  }
  jpeg_finish_compress(&to);
  jpeg_finish_decompress(&from);
  if (from.src->bytes_in_buffer > 0) leave(reinterpret_cast<j_common_ptr>(&from));  // another image, or other data
  const size_t size = errors.manager.num_warnings == 0 ? room - target.free_in_buffer : 0;
  jpeg_destroy_compress(&to);
  jpeg_destroy_decompress(&from);
  return size;
}

}  // namespace

// Writes height, width and EXIF orientation of a JPEG. Returns 0 for one that mimae_jpeg_scaled_region does not decode.
EXPORTED int mimae_jpeg_header(const char* data, size_t size, int32_t* found) {
  Header header;
  if (!read_header({data, size}, header)) return 0;
  found[0] = header.height;
  found[1] = header.width;
  found[2] = header.orientation;
  return 1;
}

// Writes the window (top, left, height, width) of a JPEG's stored pixels, RGB uint8 (height, width, 3). With a `scale`
// of 2, 4 or 8 it is a window of the image at 1 / scale of its size. Returns 0 where this cannot be done without an
// error or a warning; `out` may then hold a part of it.
EXPORTED int mimae_jpeg_scaled_region(const char* data, size_t size, const int32_t* window, int scale, uint8_t* out) {
  try {
    Header header;
    if (!read_header({data, size}, header)) return 0;
    if (scale != 1 && scale != 2 && scale != 4 && scale != 8) return 0;
    Window cut{window[0], window[1], window[2], window[3]};
    if (cut.top < 0 || cut.left < 0 || cut.height < 1 || cut.width < 1) return 0;
    if (cut.height > scaled(header.height, scale) - cut.top) return 0;
    if (cut.width > scaled(header.width, scale) - cut.left) return 0;
    const int margin = header.subsampled ? MARGIN : 0;
    std::vector<uint8_t> line;
    std::string part;
    int height = header.height, width = header.width;
    string_view all(data, size);
    // The caller turns a damaged image before it resizes it, and a sound one after it. This rounds in another way, so
    // that one must not be taken for the other, wherever the damage lies.
    const bool to_the_end = header.orientation != 1;
    Window stored{cut.top * scale, cut.left * scale, 0, 0};
    stored.height = std::min(cut.height * scale, header.height - stored.top);
    stored.width = std::min(cut.width * scale, header.width - stored.left);
    if (!to_the_end && cut_segments(all, header, margin * scale, stored, height, width, part)) {
      all = part;
      // Segments begin at whole blocks of 8 x 8 pixels, so the division has no remainder.
      cut.top = stored.top / scale;
      cut.left = stored.left / scale;
    }
    return decode(all, height, width, scale, margin, cut, to_the_end, line, out);
  } catch (...) {  // no memory
    return 0;
  }
}

// Writes a JPEG of the same pixels and metadata: one baseline scan with optimized Huffman codes, and restart markers
// between columns. Returns its size; 0 where it has no room, the JPEG cannot be read without a warning, or it has more
// than would be kept: bytes behind its end, a thumbnail of JFIF, unusual flags of Adobe.
EXPORTED size_t mimae_jpeg_transcode(const char* data, size_t size, uint8_t* out, size_t room) {
  return transcode({data, size}, out, room);
}
