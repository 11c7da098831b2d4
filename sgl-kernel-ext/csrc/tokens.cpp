#include "tokens.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace nb = nanobind;

namespace {

constexpr long long highest = UINT32_MAX;

[[noreturn]] void refuse(const std::string &what) {
    throw std::invalid_argument("token ids must be integers in 0..4294967295, not " + what);
}

// Of what is no plain int, or does not fit: may run Python code.
std::uint32_t odd_one(PyObject *item) {
    const nb::object index = nb::steal(PyNumber_Index(item));
    if (!index.is_valid()) {
        PyErr_Clear();
        refuse(std::string("a ") + Py_TYPE(item)->tp_name);
    }
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
    if (overflow != 0) refuse("one beyond 64 bits");
    if (value < 0 || value > highest) refuse(std::to_string(value));
    return static_cast<std::uint32_t>(value);
}

std::vector<std::uint32_t> of_sequence(PyObject *tokens) {
    const nb::object fast = nb::steal(PySequence_Fast(tokens, "not a sequence"));
    if (!fast.is_valid()) {
        PyErr_Clear();
        refuse(std::string("a ") + Py_TYPE(tokens)->tp_name);
    }
    std::vector<std::uint32_t> ids;
    ids.reserve(static_cast<std::size_t>(PySequence_Fast_GET_SIZE(fast.ptr())));
    // The length is asked anew each time: an item's __index__ may shorten the list.
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(fast.ptr()); ++i) {
        PyObject *item = PySequence_Fast_GET_ITEM(fast.ptr(), i);
        int overflow = 1;
        long value = -1;
        if (PyLong_CheckExact(item)) value = PyLong_AsLongAndOverflow(item, &overflow);
        if (overflow == 0 && value >= 0 && static_cast<long long>(value) <= highest) {
            ids.push_back(static_cast<std::uint32_t>(value));
        } else {
            const nb::object kept = nb::borrow(item);
            ids.push_back(odd_one(kept.ptr()));
        }
    }
    return ids;
}

template <typename Word>
std::vector<std::uint32_t> of_words(const void *data, std::size_t count) {
    std::vector<std::uint32_t> ids(count);
    const auto *bytes = static_cast<const unsigned char *>(data);
    bool fits = true;
    for (std::size_t i = 0; i < count; ++i) {
        Word word;
        std::memcpy(&word, bytes + i * sizeof word, sizeof word);
        ids[i] = static_cast<std::uint32_t>(word);
        // Wraps around to what the word was exactly when nothing was cut off or negative.
        fits &= static_cast<std::uint64_t>(word) == std::uint64_t{ids[i]};
    }
    if (!fits) refuse("what this array holds");
    return ids;
}

// Kind of the integers in a buffer, by the letters of the struct module; 0 for anything else.
char kind_of(const Py_buffer &view) {
    const char *format = view.format == nullptr ? "B" : view.format;
    if (*format == '@' || *format == '=' || *format == '<') ++format;
    if (std::strlen(format) != 1 || std::strchr("iIlLqQ", *format) == nullptr) return 0;
    const bool is_signed = *format >= 'a';
    if (view.itemsize == 4) return is_signed ? 'i' : 'I';
    if (view.itemsize == 8) return is_signed ? 'q' : 'Q';
    return 0;
}

class Buffer {
  public:
    explicit Buffer(PyObject *owner)
        : held_(PyObject_CheckBuffer(owner) != 0 &&
                PyObject_GetBuffer(owner, &view_, PyBUF_ND | PyBUF_FORMAT) == 0) {
        PyErr_Clear();  // a buffer with gaps: it is read as a sequence
    }
    ~Buffer() {
        if (held_) PyBuffer_Release(&view_);
    }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;

    const Py_buffer *view() const { return held_ && view_.ndim == 1 ? &view_ : nullptr; }

  private:
    Py_buffer view_{};
    bool held_;
};

}  // namespace

std::vector<std::uint32_t> token_ids(nb::handle tokens) {
    const Buffer buffer(tokens.ptr());
    if (const Py_buffer *view = buffer.view()) {
        const auto count = static_cast<std::size_t>(view->len / view->itemsize);
        switch (kind_of(*view)) {
            case 'i': return of_words<std::int32_t>(view->buf, count);
            case 'I': return of_words<std::uint32_t>(view->buf, count);
            case 'q': return of_words<std::int64_t>(view->buf, count);
            case 'Q': return of_words<std::uint64_t>(view->buf, count);
            default: break;
        }
    }
    return of_sequence(tokens.ptr());
}
