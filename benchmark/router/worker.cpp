// A mock SGLang worker that costs next to nothing: one thread, epoll, no allocation per chunk.
//
//   worker PORT PACE_MS [PATH FILE]...
//
// A POST whose body asks for a stream gets as many events as its max_new_tokens says, the first at
// once and the others PACE_MS apart (0: all at once, each in a write of its own); any other gets a
// short JSON answer. PATH answers with FILE's bytes; every other GET with {}.

#include <csignal>
#include <fstream>
#include <iterator>
#include <map>
#include <queue>
#include <unordered_map>
#include <vector>

#include "http.hpp"

namespace {

constexpr std::string_view kEvent =
    "data: {\"text\":\"one more token\",\"meta_info\":{\"id\":\"0\",\"finish_reason\":null,"
    "\"prompt_tokens\":1,\"completion_tokens\":1,\"cached_tokens\":0}}\n\n";
constexpr std::string_view kDone = "data: [DONE]\n\n";
constexpr std::string_view kAnswer =
    "{\"text\":\"ok\",\"meta_info\":{\"id\":\"0\",\"cached_tokens\":0,\"prompt_tokens\":1,"
    "\"completion_tokens\":1,\"finish_reason\":{\"type\":\"stop\"}}}";

struct Line {
  int fd = -1;
  uint64_t id = 0;
  std::string in, out;
  size_t events_left = 0;
};

struct Due {
  double at;
  int fd;
  uint64_t id;
  bool operator<(const Due& other) const { return at > other.at; }
};

std::string chunk(std::string_view data) {
  char size[20];
  std::snprintf(size, sizeof size, "%zx\r\n", data.size());
  return std::string(size).append(data).append("\r\n");
}

std::string answer(std::string_view body) {
  return "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: " +
         std::to_string(body.size()) + "\r\n\r\n" + std::string(body);
}

class Worker {
 public:
  Worker(int port, double pace_s, std::map<std::string, std::string, std::less<>> fixed)
      : pace_s_(pace_s), fixed_(std::move(fixed)), epoll_(epoll_create1(0)) {
    listener_ = socket(AF_INET, SOCK_STREAM, 0);
    int on = 1;
    setsockopt(listener_, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    sockaddr_in address = local(port);
    if (bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0 ||
        listen(listener_, 4096) != 0)
      fail("listen");
    unblock(listener_);
    watch(listener_, EPOLLIN, EPOLL_CTL_ADD);
  }

  void run() {
    epoll_event ready[256];
    for (;;) {
      int count = epoll_wait(epoll_, ready, 256, wait_ms());
      for (int i = 0; i < count; ++i) {
        int fd = ready[i].data.fd;
        if (fd == listener_) {
          take();
        } else if (auto found = lines_.find(fd); found != lines_.end()) {
          if (ready[i].events & EPOLLOUT) flush(found->second);
          if (ready[i].events & ~EPOLLOUT) read(found->second);
        }
      }
      double now = now_s();
      while (!due_.empty() && due_.top().at <= now) {
        Due due = due_.top();
        due_.pop();
        auto found = lines_.find(due.fd);
        if (found == lines_.end() || found->second.id != due.id) continue;
        if (next(found->second)) due_.push({due.at + pace_s_, due.fd, due.id});
      }
    }
  }

 private:
  void watch(int fd, uint32_t events, int how) {
    epoll_event event{};
    event.events = events;
    event.data.fd = fd;
    if (epoll_ctl(epoll_, how, fd, &event) != 0) fail("epoll_ctl");
  }

  int wait_ms() const {
    if (due_.empty()) return -1;
    double left = due_.top().at - now_s();
    return left <= 0 ? 0 : static_cast<int>(left * 1e3) + 1;
  }

  void take() {
    for (int fd; (fd = accept4(listener_, nullptr, nullptr, SOCK_NONBLOCK)) >= 0;) {
      no_delay(fd);
      Line& line = lines_[fd];
      line.fd = fd;
      line.id = ++last_id_;
      watch(fd, EPOLLIN, EPOLL_CTL_ADD);
    }
  }

  void drop(Line& line) {
    int fd = line.fd;
    lines_.erase(fd);
    close(fd);
  }

  void read(Line& line) {
    char data[65536];
    for (;;) {
      ssize_t got = recv(line.fd, data, sizeof data, 0);
      if (got > 0) {
        line.in.append(data, static_cast<size_t>(got));
        if (static_cast<size_t>(got) < sizeof data) break;
      } else if (got < 0 && errno == EAGAIN) {
        break;
      } else {
        return drop(line);
      }
    }
    size_t end = line.in.find("\r\n\r\n");
    if (end == std::string::npos) return;
    std::string_view head(line.in.data(), end + 2);
    size_t size = end + 4 + number(header(head, "content-length"));
    if (line.in.size() < size) return;
    std::string_view body(line.in.data() + end + 4, size - end - 4);
    size_t from = head.find(' ') + 1;
    std::string_view path = head.substr(from, head.find_first_of(" ?", from) - from);
    std::string reply;
    if (auto file = fixed_.find(path); file != fixed_.end()) {
      reply = answer(file->second);
    } else if (head.substr(0, 3) == "GET") {
      reply = answer("{}");
    } else if (contains(body, "\"stream\":true") || contains(body, "\"stream\": true")) {
      size_t at = body.find("\"max_new_tokens\":");
      line.events_left = at == std::string_view::npos ? 1 : number(body.substr(at + 17));
      reply = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
              "Transfer-Encoding: chunked\r\n\r\n";
    } else {
      reply = answer(kAnswer);
    }
    line.in.erase(0, size);
    if (!send(line, reply)) return;
    if (line.events_left == 0) return;
    double began = now_s();
    bool more = next(line);
    while (more && pace_s_ == 0) more = next(line);
    if (more) due_.push({began + pace_s_, line.fd, line.id});
  }

  static bool contains(std::string_view text, std::string_view part) {
    return memmem(text.data(), text.size(), part.data(), part.size()) != nullptr;
  }

  // The next event of a stream; false when it was the last or the line broke.
  bool next(Line& line) {
    if (--line.events_left > 0) return send(line, event_);
    send(line, last_);
    return false;
  }

  bool send(Line& line, const std::string& data) {
    size_t done = 0;
    if (line.out.empty()) {
      ssize_t sent = ::send(line.fd, data.data(), data.size(), MSG_NOSIGNAL);
      if (sent < 0 && errno != EAGAIN) return drop(line), false;
      done = sent < 0 ? 0 : static_cast<size_t>(sent);
      if (done == data.size()) return true;
      watch(line.fd, EPOLLIN | EPOLLOUT, EPOLL_CTL_MOD);
    }
    line.out.append(data, done, std::string::npos);
    return true;
  }

  void flush(Line& line) {
    ssize_t sent = ::send(line.fd, line.out.data(), line.out.size(), MSG_NOSIGNAL);
    if (sent > 0) line.out.erase(0, static_cast<size_t>(sent));
    if (line.out.empty()) watch(line.fd, EPOLLIN, EPOLL_CTL_MOD);
  }

  double pace_s_;
  std::map<std::string, std::string, std::less<>> fixed_;
  int epoll_;
  int listener_;
  uint64_t last_id_ = 0;
  std::unordered_map<int, Line> lines_;
  std::priority_queue<Due> due_;
  const std::string event_ = chunk(kEvent);
  const std::string last_ = chunk(kEvent) + chunk(kDone) + "0\r\n\r\n";
};

}  // namespace

int main(int count, char** words) {
  if (count < 3 || count % 2 == 0) {
    std::fprintf(stderr, "usage: worker PORT PACE_MS [PATH FILE]...\n");
    return 2;
  }
  std::map<std::string, std::string, std::less<>> fixed;
  for (int i = 3; i < count; i += 2) {
    std::ifstream file(words[i + 1], std::ios::binary);
    if (!file) fail(words[i + 1]);
    fixed[words[i]] = std::string(std::istreambuf_iterator<char>(file), {});
  }
  std::signal(SIGPIPE, SIG_IGN);
  Worker(std::atoi(words[1]), std::atof(words[2]) / 1e3, std::move(fixed)).run();
}
