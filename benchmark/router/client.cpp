// The load generator: keep-alive connections, one thread, epoll. Prints one JSON object.
//
//   client latency BODIES REQUESTS PORT...       one connection a port, the ports in turns
//   client load BODIES CONNECTIONS SECONDS PORT  every connection sends again as soon as it may
//   client once BODIES CONNECTIONS SPREAD_MS PORT  one request a connection, begun over SPREAD_MS
//
// BODIES: files of one request body a line, sent to /generate in turn. Milliseconds to the first
// byte of the answer's body (first), to its last (total), and between them (body).

#include <algorithm>
#include <fstream>
#include <unordered_map>
#include <vector>

#include "http.hpp"

namespace {

constexpr double kLimitS = 120;

struct Sample {
  double first_ms, total_ms, body_ms;
};

// One connection and what of its answer has come so far.
class Line {
 public:
  explicit Line(int port) : fd(connect_to(port)) {}

  void ask(const std::string& body) {
    data_.clear();
    at_ = events = 0;
    left_ = 0;
    head_done_ = chunked_ = first_seen_ = false;
    status = 0;
    out_ = "POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
           "Content-Length: " +
           std::to_string(body.size()) + "\r\n\r\n" + body;
    began = now_s();
    write();
  }

  void write() {
    while (!out_.empty()) {
      ssize_t sent = send(fd, out_.data(), out_.size(), MSG_NOSIGNAL);
      if (sent < 0 && errno == EAGAIN) return;
      if (sent < 0) fail("send");
      out_.erase(0, static_cast<size_t>(sent));
    }
  }

  bool writing() const { return !out_.empty(); }

  // True when the answer is whole.
  bool read() {
    char data[65536];
    for (;;) {
      ssize_t got = recv(fd, data, sizeof data, 0);
      if (got < 0 && errno == EAGAIN) return false;
      if (got <= 0) {
        std::fprintf(stderr, "the connection broke (status %d)\n", status);
        std::exit(1);
      }
      data_.append(data, static_cast<size_t>(got));
      if (parse()) return true;
      if (static_cast<size_t>(got) < sizeof data) return false;
    }
  }

  Sample sample() const {
    double end = now_s();
    return {(first_at_ - began) * 1e3, (end - began) * 1e3, (end - first_at_) * 1e3};
  }

  int fd;
  int status = 0;
  double began = 0;
  size_t events = 0;

 private:
  bool parse() {
    if (!head_done_) {
      size_t end = data_.find("\r\n\r\n");
      if (end == std::string::npos) return false;
      std::string_view head(data_.data(), end + 2);
      status = static_cast<int>(number(head.substr(9)));
      chunked_ = !header(head, "transfer-encoding").empty();
      left_ = number(header(head, "content-length"));
      head_done_ = true;
      at_ = end + 4;
    }
    if (data_.size() > at_ && !first_seen_) {
      first_seen_ = true;
      first_at_ = now_s();
    }
    if (!chunked_) return data_.size() - at_ >= left_;
    for (;;) {
      size_t end = data_.find("\r\n", at_);
      if (end == std::string::npos) return false;
      size_t size = std::strtoul(data_.c_str() + at_, nullptr, 16);
      if (data_.size() < end + 2 + size + 2) return false;
      if (size == 0) return true;
      std::string_view part(data_.data() + end + 2, size);
      for (size_t i = 0; (i = part.find("data:", i)) != std::string_view::npos; i += 5) ++events;
      at_ = end + 2 + size + 2;
    }
  }

  std::string data_, out_;
  size_t at_ = 0, left_ = 0;
  bool head_done_ = false, chunked_ = false, first_seen_ = false;
  double first_at_ = 0;
};

std::vector<std::string> read_bodies(const char* file) {
  std::ifstream lines(file);
  std::vector<std::string> bodies;
  for (std::string line; std::getline(lines, line);) bodies.push_back(line);
  if (bodies.empty()) fail(file);
  return bodies;
}

void print_quantiles(const char* name, std::vector<double> values) {
  std::sort(values.begin(), values.end());
  auto at = [&](double share) {
    return values[static_cast<size_t>(share * static_cast<double>(values.size() - 1))];
  };
  std::printf("\"%s\":{\"p50\":%.4f,\"p90\":%.4f,\"p99\":%.4f,\"min\":%.4f,\"max\":%.4f}", name,
              at(0.5), at(0.9), at(0.99), values.front(), values.back());
}

void print(const std::vector<Sample>& samples) {
  std::vector<double> first, total, body;
  for (const Sample& one : samples) {
    first.push_back(one.first_ms);
    total.push_back(one.total_ms);
    body.push_back(one.body_ms);
  }
  print_quantiles("first_ms", first);
  std::printf(",");
  print_quantiles("total_ms", total);
  std::printf(",");
  print_quantiles("body_ms", body);
}

void require_success(const Line& line) {
  if (line.status == 200) return;
  std::fprintf(stderr, "answered %d\n", line.status);
  std::exit(1);
}

void latency(const std::vector<std::string>& bodies, int requests, std::vector<int> ports) {
  std::vector<Line> lines;
  for (int port : ports) lines.emplace_back(port);
  std::vector<std::vector<Sample>> samples(ports.size());
  const int warm = requests / 10 + 5;
  int epoll = epoll_create1(0);
  for (Line& line : lines) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.ptr = &line;
    epoll_ctl(epoll, EPOLL_CTL_ADD, line.fd, &event);
  }
  for (int i = 0; i < requests + warm; ++i) {
    for (size_t k = 0; k < lines.size(); ++k) {
      // Who goes first changes from round to round.
      size_t chosen = (k + static_cast<size_t>(i)) % lines.size();
      Line& line = lines[chosen];
      line.ask(bodies[static_cast<size_t>(i) % bodies.size()]);
      for (bool whole = false; !whole;) {
        if (line.writing()) line.write();
        epoll_event ready;
        if (!line.writing() && epoll_wait(epoll, &ready, 1, 30000) == 0) fail("no answer");
        whole = line.read();
      }
      require_success(line);
      if (i >= warm) samples[chosen].push_back(line.sample());
    }
  }
  std::printf("[");
  for (size_t k = 0; k < samples.size(); ++k) {
    std::printf("%s{", k ? "," : "");
    print(samples[k]);
    std::printf("}");
  }
  std::printf("]\n");
}

// `again`: connections go on until `seconds` are over; else one request each, begun over them.
void load(const std::vector<std::string>& bodies, int connections, double seconds, int port,
          bool again) {
  std::vector<Line> lines;
  lines.reserve(static_cast<size_t>(connections));
  int epoll = epoll_create1(0);
  for (int i = 0; i < connections; ++i) {
    epoll_event event{};
    event.events = EPOLLIN;
    lines.emplace_back(port);
    event.data.ptr = &lines.back();
    epoll_ctl(epoll, EPOLL_CTL_ADD, lines.back().fd, &event);
  }
  std::vector<Sample> samples;
  size_t next = 0, asked = 0, open = 0, events = 0;
  double began = now_s();
  const double step = again ? 0 : seconds / connections;
  epoll_event ready[256];
  std::vector<Line*> unsent;
  while (asked < lines.size() || open > 0) {
    double now = now_s();
    if (now - began > kLimitS) fail("took too long");
    while (asked < lines.size() && began + step * static_cast<double>(asked) <= now) {
      lines[asked].ask(bodies[next++ % bodies.size()]);
      if (lines[asked].writing()) unsent.push_back(&lines[asked]);
      ++asked, ++open;
    }
    for (Line* line : unsent) line->write();
    unsent.erase(std::remove_if(unsent.begin(), unsent.end(), [](Line* l) { return !l->writing(); }),
                 unsent.end());
    int count = epoll_wait(epoll, ready, 256, asked < lines.size() || !unsent.empty() ? 1 : 1000);
    for (int i = 0; i < count; ++i) {
      Line& line = *static_cast<Line*>(ready[i].data.ptr);
      if (!line.read()) continue;
      require_success(line);
      samples.push_back(line.sample());
      events += line.events;
      if (again && now_s() - began < seconds) {
        line.ask(bodies[next++ % bodies.size()]);
        if (line.writing()) unsent.push_back(&line);
      } else {
        --open;
      }
    }
  }
  double took = now_s() - began;
  std::printf("{\"requests\":%zu,\"seconds\":%.3f,\"requests_per_s\":%.1f,\"events_per_s\":%.1f,",
              samples.size(), took, static_cast<double>(samples.size()) / took,
              static_cast<double>(events) / took);
  print(samples);
  std::printf("}\n");
}

}  // namespace

int main(int count, char** words) {
  std::string mode = count > 1 ? words[1] : "";
  if (mode == "latency" && count >= 5) {
    std::vector<int> ports;
    for (int i = 4; i < count; ++i) ports.push_back(std::atoi(words[i]));
    latency(read_bodies(words[2]), std::atoi(words[3]), ports);
  } else if ((mode == "load" || mode == "once") && count == 6) {
    double seconds = std::atof(words[4]) / (mode == "once" ? 1e3 : 1);
    load(read_bodies(words[2]), std::atoi(words[3]), seconds, std::atoi(words[5]), mode == "load");
  } else {
    std::fprintf(stderr, "usage: client latency|load|once BODIES ...\n");
    return 2;
  }
}
