#include "device.h"

#include <csetjmp>
#include <memory>
#include <numeric>
#include <vector>

#include <ucontext.h>

namespace stiv::emulation {
namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kGuardBytes = 4096;
constexpr unsigned char kPoison = 0xff;  // four of them are a NaN, in every type

struct Copy {
    void* shared;
    const void* global;
    int group;
};

struct Fiber {
    int index = 0;
    jmp_buf context;
    std::unique_ptr<char[]> stack;
    ucontext_t start;
    const uint64_t* awaited = nullptr;  // blocked while this counter has the value `seen`
    uint64_t seen = 0;
    bool finished = true;
    std::vector<Copy> copies;
    int committed = 0;
};

struct Gate {
    int arrived = 0;
    uint64_t passed = 0;
};

struct Warp {
    Gate gate;
    Exchange exchange;
};

struct Random {
    uint64_t state = 0;
    uint32_t next() {  // PCG step
        state = state * 6364136223846793005u + 1442695040888963407u;
        return static_cast<uint32_t>(state >> 33);
    }
};

class Machine {
public:
    bool run_block(int block, int threads, int shared_bytes, const std::function<void()>& body);
    void wait(Gate& gate, int size, const std::function<void()>& last);
    Fiber& fiber() { return *current_; }
    Warp& warp() { return warps_[current_->index / kWarp]; }
    unsigned char* shared() { return shared_.data(); }
    int block() const { return block_; }
    Gate& block_gate() { return gate_; }
    int threads() const { return threads_; }
    uint64_t seed = 0;

private:
    static void enter();
    bool schedule();
    bool turn(Fiber& fiber);
    void prepare(int threads, int shared_bytes);

    std::vector<std::unique_ptr<Fiber>> fibers_;
    std::vector<Warp> warps_;
    std::vector<unsigned char> shared_;
    const std::function<void()>* body_ = nullptr;
    Fiber* current_ = nullptr;
    jmp_buf scheduler_;
    ucontext_t home_;
    Gate gate_;
    Random random_;
    int block_ = 0, threads_ = 0;
};

thread_local Machine machine;

void Machine::enter() {
    (*machine.body_)();
    machine.current_->finished = true;
    _longjmp(machine.scheduler_, 1);
}

void Machine::prepare(int threads, int shared_bytes) {
    while (static_cast<int>(fibers_.size()) < threads) {
        fibers_.push_back(std::make_unique<Fiber>());
        fibers_.back()->index = static_cast<int>(fibers_.size()) - 1;
        fibers_.back()->stack.reset(new char[kStackBytes]);
    }
    shared_.assign(shared_bytes + kGuardBytes, kPoison);
    warps_.assign((threads + kWarp - 1) / kWarp, Warp{});
    gate_ = Gate{};
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = *fibers_[i];
        fiber.finished = false;
        fiber.awaited = nullptr;
        fiber.copies.clear();
        fiber.committed = 0;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = kStackBytes;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, &Machine::enter, 0);
        fiber.seen = ~uint64_t{0};  // marks a fiber that has not started
    }
}

// One turn of a fiber, from where it stands to its next wait. False if it cannot move.
bool Machine::turn(Fiber& fiber) {
    if (fiber.finished || (fiber.awaited && *fiber.awaited == fiber.seen)) return false;
    current_ = &fiber;
    if (_setjmp(scheduler_) == 0) {
        if (fiber.awaited) _longjmp(fiber.context, 1);
        setcontext(&fiber.start);
    }
    return true;
}

bool Machine::schedule() {
    while (true) {
        bool moved = false, skipped = false, all_finished = true;
        int first = 0, stride = 1;
        uint32_t lazy = 0;  // warps that sit this round out, so that warps drift apart
        if (seed) {
            first = static_cast<int>(random_.next() % threads_);
            do stride = static_cast<int>(random_.next() % threads_) + 1;
            while (std::gcd(stride, threads_) != 1);
            lazy = random_.next() & random_.next();
        }
        for (int i = 0, at = first; i < threads_; ++i, at = (at + stride) % threads_) {
            Fiber& fiber = *fibers_[at];
            if (fiber.finished) continue;
            all_finished = false;
            if (lazy >> (at / kWarp) & 1u) {
                skipped = true;
                continue;
            }
            moved |= turn(fiber);
        }
        if (all_finished) return true;
        if (!moved && !skipped) return false;
    }
}

bool Machine::run_block(int block, int threads, int shared_bytes, const std::function<void()>& body) {
    block_ = block;
    threads_ = threads;
    body_ = &body;
    random_.state = seed * 0x9e3779b97f4a7c15u + static_cast<uint64_t>(block);
    prepare(threads, shared_bytes);
    if (!schedule()) return false;
    for (size_t i = shared_bytes; i < shared_.size(); ++i)
        if (shared_[i] != kPoison) return false;
    return true;
}

void Machine::wait(Gate& gate, int size, const std::function<void()>& last) {
    if (++gate.arrived == size) {
        last();
        gate.arrived = 0;
        ++gate.passed;
        return;
    }
    Fiber& fiber = *current_;
    fiber.awaited = &gate.passed;
    fiber.seen = gate.passed;
    if (_setjmp(fiber.context) == 0) _longjmp(scheduler_, 1);
}

}  // namespace

bool launch(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& body) {
    for (int64_t block = 0; block < blocks; ++block)
        if (!machine.run_block(static_cast<int>(block), threads, shared_bytes, body)) return false;
    return true;
}

void set_seed(uint64_t seed) { machine.seed = seed; }

const uint32_t* exchange(const uint64_t (&in)[4], Combine combine) {
    Warp& warp = machine.warp();
    const int lane = machine.fiber().index % kWarp;
    std::memcpy(warp.exchange.in[lane], in, sizeof in);
    machine.wait(warp.gate, kWarp, [&] { combine(warp.exchange); });
    return warp.exchange.out[lane];
}

void copy_async(void* shared, const void* global) {
    std::memset(shared, kPoison, 16);
    machine.fiber().copies.push_back({shared, global, machine.fiber().committed});
}

void copy_async_commit() { ++machine.fiber().committed; }

void copy_async_wait(int pending) {
    Fiber& fiber = machine.fiber();
    std::vector<Copy> later;
    for (const Copy& copy : fiber.copies) {
        if (copy.group < fiber.committed - pending)
            std::memcpy(copy.shared, copy.global, 16);
        else
            later.push_back(copy);
    }
    fiber.copies.swap(later);
}

void combine_nothing(Exchange&) {}

void combine_shuffle(Exchange& warp) {
    for (int lane = 0; lane < kWarp; ++lane) warp.out[lane][0] = static_cast<uint32_t>(warp.in[warp.in[lane][1]][0]);
}

// Matrix i has its row r at the address that lane 8 i + r gives. A lane gets row lane / 4, columns 2 (lane % 4) and the
// next; transposed: column lane / 4, rows 2 (lane % 4) and the next.
template <int kMatrices, bool kTransposed>
void combine_load_matrix(Exchange& warp) {
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
        uint16_t cells[8][8];
        for (int row = 0; row < 8; ++row)
            std::memcpy(cells[row], reinterpret_cast<const void*>(warp.in[matrix * 8 + row][0]), sizeof cells[row]);
        for (int lane = 0; lane < kWarp; ++lane) {
            const int major = lane / 4, minor = lane % 4 * 2;
            const uint32_t low = kTransposed ? cells[minor][major] : cells[major][minor];
            const uint32_t high = kTransposed ? cells[minor + 1][major] : cells[major][minor + 1];
            warp.out[lane][matrix] = low | high << 16;
        }
    }
}

template void combine_load_matrix<4, false>(Exchange&);
template void combine_load_matrix<2, false>(Exchange&);
template void combine_load_matrix<4, true>(Exchange&);
template void combine_load_matrix<2, true>(Exchange&);

namespace {

// A lane deposits its fragments as words: c in 0..3, a in 4.., b behind a. kDepth is 16 or 8.
template <class Number, int kDepth>
void combine_multiply(Exchange& warp) {
    constexpr int kParts = kDepth / 8;
    float a[16][kDepth], b[kDepth][8];
    for (int lane = 0; lane < kWarp; ++lane) {
        const auto* words = reinterpret_cast<const uint32_t*>(warp.in[lane][0]);
        const int group = lane / 4, pair = lane % 4 * 2;
        for (int part = 0; part < kParts; ++part) {
            const int k = pair + 8 * part;
            unpack(Number{}, words[4 + 2 * part], a[group][k], a[group][k + 1]);
            unpack(Number{}, words[5 + 2 * part], a[group + 8][k], a[group + 8][k + 1]);
            unpack(Number{}, words[4 + 2 * kParts + part], b[k][group], b[k + 1][group]);
        }
    }
    float product[16][8] = {};
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < kDepth; ++k)
            for (int column = 0; column < 8; ++column) product[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < kWarp; ++lane) {
        const auto* c = reinterpret_cast<const float*>(warp.in[lane][0]);
        const int group = lane / 4, pair = lane % 4 * 2;
        for (int i = 0; i < 4; ++i)
            warp.out[lane][i] = float_bits(c[i] + product[group + i / 2 * 8][pair + i % 2]);
    }
}

template <class Number, int kDepth>
void multiply(float (&c)[4], const uint32_t* a, const uint32_t* b) {
    constexpr int kParts = kDepth / 8;
    uint32_t words[4 + 3 * kParts];
    std::memcpy(words, c, sizeof c);
    std::memcpy(words + 4, a, 8 * kParts);
    std::memcpy(words + 4 + 2 * kParts, b, 4 * kParts);
    const uint32_t* out = exchange({reinterpret_cast<uint64_t>(words), 0, 0, 0}, combine_multiply<Number, kDepth>);
    std::memcpy(c, out, sizeof c);
}

}  // namespace
}  // namespace stiv::emulation

namespace stiv {

int thread_index() { return emulation::machine.fiber().index; }
int block_index() { return emulation::machine.block(); }
unsigned char* shared_memory() { return emulation::machine.shared(); }

void sync_block() {
    emulation::machine.wait(emulation::machine.block_gate(), emulation::machine.threads(), [] {});
}

void multiply_add(BFloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t b[2] = {b0, b1};
    emulation::multiply<BFloat16, 16>(c, a, b);
}

void multiply_add(Float16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t b[2] = {b0, b1};
    emulation::multiply<Float16, 16>(c, a, b);
}

void multiply_add(BFloat16, float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
    emulation::multiply<BFloat16, 8>(c, a, &b);
}

void multiply_add(Float16, float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
    emulation::multiply<Float16, 8>(c, a, &b);
}

}  // namespace stiv
