-- What wrk sends: one method and body to each path of a list in turn, and what it says at the end.
-- With many more paths than connections, no two requests in flight share one.
local method = os.getenv("BENCH_METHOD")
local body = os.getenv("BENCH_BODY")
local ready = {}
local at = 0

function init()
  for path in io.lines(os.getenv("BENCH_PATHS")) do
    ready[#ready + 1] = wrk.format(method, path, {["content-type"] = "application/json"}, body)
  end
end

function request()
  at = at % #ready + 1
  return ready[at]
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '{"rate": %.3f, "p50_ms": %.4f, "p99_ms": %.4f, "failed": %d}\n',
    summary.requests / (summary.duration / 1e6), latency:percentile(50) / 1e3,
    latency:percentile(99) / 1e3,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
