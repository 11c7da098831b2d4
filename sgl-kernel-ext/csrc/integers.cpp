#include "integers.h"

#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace nb = nanobind;

namespace {

constexpr Py_ssize_t prefetch_ahead = 16;

struct TokenId {
    using Word = std::uint32_t;
    static constexpr const char *wanted = "token ids must be integers in 0..4294967295";
};

struct Key {
    using Word = std::int64_t;
    static constexpr const char *wanted = "page keys must be integers of 64 bits, signed";
};

template <typename Kind>
[[noreturn]] void refuse(const std::string &what) {
    throw std::invalid_argument(std::string(Kind::wanted) + ", not " + what);
}

template <typename Kind, typename Value>
bool fits(Value value) {
    using Word = typename Kind::Word;
    // Both comparisons are exact: cut to a word and widened again, the value and its sign stay.
    const Word word = static_cast<Word>(value);
    return static_cast<Value>(word) == value && (word < 0) == (value < 0);
}

// Of what is no plain int, or does not fit: may run Python code.
template <typename Kind>
typename Kind::Word odd_one(PyObject *item) {
    const nb::object index = nb::steal(PyNumber_Index(item));
    if (!index.is_valid()) {
        PyErr_Clear();
        refuse<Kind>(std::string("a ") + Py_TYPE(item)->tp_name);
    }
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
    if (overflow != 0) refuse<Kind>("one beyond 64 bits");
    if (!fits<Kind>(value)) refuse<Kind>(std::to_string(value));
    return static_cast<typename Kind::Word>(value);
}

template <typename Kind>
std::vector<typename Kind::Word> of_sequence(PyObject *items) {
    const nb::object fast = nb::steal(PySequence_Fast(items, "not a sequence"));
    if (!fast.is_valid()) {
        PyErr_Clear();
        refuse<Kind>(std::string("a ") + Py_TYPE(items)->tp_name);
    }
    std::vector<typename Kind::Word> words;
    words.reserve(static_cast<std::size_t>(PySequence_Fast_GET_SIZE(fast.ptr())));
    // The length is asked anew each time: an item's __index__ may shorten the list.
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(fast.ptr()); ++i) {
        // Each int is an object of its own, anywhere in memory.
        if (i + prefetch_ahead < PySequence_Fast_GET_SIZE(fast.ptr())) {
            __builtin_prefetch(PySequence_Fast_GET_ITEM(fast.ptr(), i + prefetch_ahead));
        }
        PyObject *item = PySequence_Fast_GET_ITEM(fast.ptr(), i);
        int overflow = 1;
        long long value = 0;
        if (PyLong_CheckExact(item)) value = PyLong_AsLongLongAndOverflow(item, &overflow);
        if (overflow == 0 && fits<Kind>(value)) {
            words.push_back(static_cast<typename Kind::Word>(value));
        } else {
            const nb::object kept = nb::borrow(item);
            words.push_back(odd_one<Kind>(kept.ptr()));
        }
    }
    return words;
}

template <typename Kind, typename From>
std::vector<typename Kind::Word> of_words(const void *data, std::size_t count) {
    std::vector<typename Kind::Word> words(count);
    const auto *bytes = static_cast<const unsigned char *>(data);
    bool all_fit = true;
    for (std::size_t i = 0; i < count; ++i) {
        From value;
        std::memcpy(&value, bytes + i * sizeof value, sizeof value);
        words[i] = static_cast<typename Kind::Word>(value);
        all_fit &= fits<Kind>(value);
    }
    if (!all_fit) refuse<Kind>("what this array holds");
    return words;
}

// Kind of the integers in a buffer, by the letters of the struct module; 0 for anything else.
char letter_of(const Py_buffer &view) {
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

template <typename Kind>
std::vector<typename Kind::Word> words_of(nb::handle items) {
    // Lists, the usual case, have no buffer to ask for.
    if (PyList_CheckExact(items.ptr())) return of_sequence<Kind>(items.ptr());
    const Buffer buffer(items.ptr());
    if (const Py_buffer *view = buffer.view()) {
        const auto count = static_cast<std::size_t>(view->len / view->itemsize);
        switch (letter_of(*view)) {
            case 'i': return of_words<Kind, std::int32_t>(view->buf, count);
            case 'I': return of_words<Kind, std::uint32_t>(view->buf, count);
            case 'q': return of_words<Kind, std::int64_t>(view->buf, count);
            case 'Q': return of_words<Kind, std::uint64_t>(view->buf, count);
            default: break;
        }
    }
    return of_sequence<Kind>(items.ptr());
}

}  // namespace

std::vector<std::uint32_t> token_ids(nb::handle tokens) { return words_of<TokenId>(tokens); }

std::vector<std::int64_t> page_keys_of(nb::handle keys) { return words_of<Key>(keys); }
