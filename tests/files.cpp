// The checkpoint: what is saved is loaded again in every bit, whatever fails leaves the old file whole, and no file can do harm.
#include <ctype.h>
#include <fenv.h>
#include <math.h>
#include <stdlib.h>
#include <unistd.h>

#include <map>
#include <string>
#include <vector>

#include "../babygpt.h"
#include "check.h"

using namespace babygpt;

namespace {

// ---- a host whose memory and disk can fail ---------------------------------------------------------------------------

struct Host {
    Runtime runtime;
    // Memory: the allocation number `fail_allocation` (from 1) gets none.
    int64_t allocations = 0, fail_allocation = 0, blocks = 0;
    uint64_t live = 0, total = 0;
    // Disk: the writing call number `fail_call` (from 1) fails; so does the read number `fail_read`. No read gives more than `piece` bytes.
    std::map<std::string, std::string> files;
    int64_t calls = 0, fail_call = 0, reads = 0, fail_read = 0, piece = 1 << 20;
    int open_files = 0;
    const char* failed = "";

    struct Handle {
        std::string path;
        bool writes;
    };
    bool fails(const char* what) {
        if (++calls != fail_call) return false;
        failed = what;
        return true;
    }
    static Host& self(void* user) { return *static_cast<Host*>(user); }
    static std::string& content(Host& host, void* file) { return host.files[static_cast<Handle*>(file)->path]; }

    Host() {
        runtime.backend = Backend::plain;
        runtime.threads = 1;
        runtime.memory_user = this;
        runtime.allocate = [](void* user, size_t bytes, size_t alignment) -> void* {
            Host& host = self(user);
            if (++host.allocations == host.fail_allocation) return nullptr;
            ++host.blocks;
            host.live += bytes;
            host.total += bytes;
            void* memory = nullptr;
            return posix_memalign(&memory, alignment, bytes) == 0 ? memory : nullptr;
        };
        runtime.release = [](void* user, void* memory, size_t bytes) {
            --self(user).blocks;
            self(user).live -= bytes;
            free(memory);
        };
        FileHooks& hooks = runtime.files;
        hooks.user = this;
        hooks.open = [](void* user, const char* path, FileMode mode) -> void* {
            Host& host = self(user);
            if (mode == FileMode::read ? host.files.count(path) == 0 : host.fails("open")) return nullptr;
            if (mode == FileMode::write) host.files[path].clear();
            ++host.open_files;
            return new Handle{path, mode == FileMode::write};
        };
        hooks.size = [](void* user, void* file) { return static_cast<int64_t>(content(self(user), file).size()); };
        hooks.read = [](void* user, void* file, int64_t offset, void* to, int64_t bytes) -> int64_t {
            Host& host = self(user);
            const std::string& from = content(host, file);
            if (++host.reads == host.fail_read) return -1;
            if (offset < 0 || static_cast<size_t>(offset) >= from.size()) return 0;
            int64_t n = static_cast<int64_t>(from.size()) - offset;
            n = n < bytes ? n : bytes;
            n = n < host.piece ? n : host.piece;
            memcpy(to, from.data() + offset, static_cast<size_t>(n));
            return n;
        };
        hooks.write = [](void* user, void* file, const void* from, int64_t bytes) -> int64_t {
            Host& host = self(user);
            const bool fails = host.fails("write");
            if (fails) bytes /= 2;
            content(host, file).append(static_cast<const char*>(from), static_cast<size_t>(bytes));
            return fails ? bytes - 1 : bytes;
        };
        hooks.sync = [](void* user, void*) { return self(user).fails("sync") ? -1 : 0; };
        hooks.close = [](void* user, void* file) {
            Handle* handle = static_cast<Handle*>(file);
            const bool fails = handle->writes && self(user).fails("close");
            delete handle;
            --self(user).open_files;
            return fails ? -1 : 0;
        };
        hooks.rename = [](void* user, const char* from, const char* to) {
            Host& host = self(user);
            if (host.fails("rename")) return -1;
            host.files[to] = host.files[from];
            host.files.erase(from);
            return 0;
        };
        hooks.remove = [](void* user, const char* path) { return self(user).files.erase(path) == 1 ? 0 : -1; };
        hooks.sync_folder = [](void* user, const char*) { return self(user).fails("sync_folder") ? -1 : 0; };
    }
    void start_counting() { allocations = calls = reads = fail_allocation = fail_call = fail_read = 0, total = 0; }
};

// ---- small models ----------------------------------------------------------------------------------------------------

Config small_config() {
    Config config;
    config.layers = 1, config.heads = 1, config.width = 4, config.context = 4;
    return config;
}

// With a character tokenizer, so that nothing of a checkpoint is missing.
bool make(Runtime& runtime, const Config& config, Model& model, uint64_t seed = 1) {
    Tokenizer tokenizer;
    TokenizerConfig characters;
    characters.kind = TokenizerKind::characters;
    return CHECK_OK(tokenizer.train(runtime, characters, Text("abcd "))) &&
           CHECK_OK(model.create(runtime, config, static_cast<Tokenizer&&>(tokenizer), seed)) &&
           CHECK_OK(model.set_chat("You: \"hey\"\n", "Me:\t"));
}

std::string bytes_of(const Array<char>& array) { return std::string(array.items, array.count); }

std::string saved(const Model& model) {
    Array<char> bytes;
    CHECK_OK(model.save_memory(bytes));
    return bytes_of(bytes);
}

bool same_tensors(const Model& a, const Model& b) {
    Array<Difference> rows;
    if (!compare(a, b, rows).ok() || rows.count == 0) return false;
    for (const Difference& row : rows)
        if (!row.same_bits) return false;
    return true;
}

bool same_config(const Config& a, const Config& b) {
    return a.layers == b.layers && a.heads == b.heads && a.width == b.width && a.context == b.context && a.vocab == b.vocab &&
           a.tied == b.tied && a.bias == b.bias && a.activation == b.activation && a.positions == b.positions &&
           a.architecture == b.architecture && a.norm == b.norm && a.norm_after == b.norm_after && a.gated == b.gated &&
           a.norm_epsilon == b.norm_epsilon && a.rope_base == b.rope_base && (a.kv_heads == b.kv_heads || !a.kv_heads || !b.kv_heads) &&
           (a.hidden == b.hidden || !a.hidden || !b.hidden);
}

std::string text_of(const Tokenizer& tokenizer) {
    Array<char> json;
    CHECK_OK(tokenizer.save_memory(json));
    return bytes_of(json);
}

bool same(const Model& a, const Model& b) {
    return same_tensors(a, b) && same_config(a.config, b.config) && a.parameters == b.parameters && a.tokenizer.kind == b.tokenizer.kind &&
           (a.tokenizer.kind == TokenizerKind::none || text_of(a.tokenizer) == text_of(b.tokenizer)) &&
           bytes_of(a.chat.user_turn) == bytes_of(b.chat.user_turn) && bytes_of(a.chat.reply_turn) == bytes_of(b.chat.reply_turn);
}

bool has(const Status& status, Error error, const char* words) {
    const bool good = status.error == error && strstr(status.message, words);
    if (!good) printf("  got error %d, '%s', expected '%s'\n", static_cast<int>(status.error), status.message, words);
    return good;
}

// ---- files made by hand ----------------------------------------------------------------------------------------------

std::string header_of(const std::string& file) {
    uint64_t length = 0;
    for (size_t i = 8; i-- > 0;) length = length << 8 | static_cast<unsigned char>(file[i]);
    return file.substr(8, static_cast<size_t>(length));
}
std::string data_of(const std::string& file) { return file.substr(8 + header_of(file).size()); }
std::string with_header(const std::string& header, const std::string& data) {
    std::string file;
    for (size_t i = 0; i < 8; ++i) file += static_cast<char>(static_cast<uint64_t>(header.size()) >> (8 * i) & 0xff);
    return file + header + data;
}
std::string replaced(std::string text, const std::string& from, const std::string& to) {
    const size_t at = text.find(from);
    CHECK(at != std::string::npos);
    return at == std::string::npos ? text : text.replace(at, from.size(), to);
}

uint64_t next_random(uint64_t& state) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}

// What chapter 9 promises: all memory taken while loading, added up.
uint64_t memory_bound(size_t file) { return 100 * static_cast<uint64_t>(file) + (256 << 10); }

// ---- training --------------------------------------------------------------------------------------------------------

TrainConfig small_training() {
    TrainConfig config;
    config.batch = 2;
    config.steps = 6;
    config.lr = 0.1 / 3;
    config.dropout = 0.1;
    config.seed = 0xfedcba9876543210u;
    return config;
}

struct Training {
    std::vector<int32_t> ids;
    Data training, validation;
    Model model;
    Trainer trainer;
    bool create(Host& host, const TrainConfig& config, uint64_t seed = 1, int tokens = 40, const Config& shape = small_config()) {
        for (int i = 0; i < tokens; ++i) ids.push_back(i * i % 5);
        return make(host.runtime, shape, model, seed) &&
               CHECK_OK(training.create(host.runtime, Span<const int32_t>(ids.data(), ids.size()))) &&
               CHECK_OK(validation.create(host.runtime, Span<const int32_t>(ids.data(), 17))) &&
               CHECK_OK(trainer.create(host.runtime, model, config, training, &validation));
    }
    bool steps(int count) {
        for (StepResult result; count > 0; --count)
            if (!CHECK_OK(trainer.step(result))) return false;
        return true;
    }
    size_t bytes() const { return static_cast<size_t>(model.block) * sizeof(float); }
    // Weights, moments and where training stands, as bytes.
    std::string snapshot() const {
        std::string all;
        for (const float* block : {static_cast<const float*>(model.weights), static_cast<const float*>(trainer.moment1),
                                   static_cast<const float*>(trainer.moment2)})
            all.append(reinterpret_cast<const char*>(block), bytes());
        for (int64_t value : {trainer.step_count, trainer.best_step, trainer.bad_evaluations})
            all.append(reinterpret_cast<const char*>(&value), sizeof value);
        return all.append(reinterpret_cast<const char*>(&trainer.best_validation_loss), sizeof(double));
    }
};

// ---- round trips -----------------------------------------------------------------------------------------------------

TEST(round_trip, "a model that was saved would not come back as it was") {
    Host host;
    for (int variant = 0; variant < 48; ++variant) {
        Config config = small_config();
        config.dtype = static_cast<Dtype>(variant / 16);
        config.positions = variant & 8 ? Positions::rotary : Positions::learned;
        config.layers = 1 + variant % 3, config.heads = 2;
        config.tied = variant & 1, config.bias = variant & 2, config.activation = variant & 4 ? Activation::gelu : Activation::gelu_tanh;
        if (variant % 5 == 1) {
            CHECK_OK(preset_architecture("llama", config));
            config.kv_heads = 1, config.hidden = 3, config.norm_epsilon = 3e-6, config.rope_base = 500000, config.bias = variant & 2;
        }
        if (variant % 5 == 2) config.gated = true, config.norm = Norm::rms, config.norm_after = variant & 1, config.norm_epsilon = 0.1;
        if (variant % 5 == 3)
            config.positions = variant & 8 ? Positions::none : Positions::sinusoidal, config.hidden = 5, config.kv_heads = 1;
        Model model, from_file, from_memory;
        if (!make(host.runtime, config, model)) return;
        const std::string bytes = saved(model);
        CHECK_OK(model.save("folder/model.safetensors"));
        CHECK(host.files.size() == 1 && host.files["folder/model.safetensors"] == bytes);
        CHECK_OK(from_file.load(host.runtime, "folder/model.safetensors"));
        CHECK_OK(from_memory.load_memory(host.runtime, bytes));
        CHECK(same(model, from_file) && same(model, from_memory));
        CHECK(saved(from_file) == bytes);
    }
    CHECK(host.open_files == 0 && host.blocks == 0);
}

TEST(round_trip_on_the_real_disk, "saving to a real folder would not work or would leave a temporary file") {
    Runtime runtime;
    Model model, loaded;
    char path[64];
    snprintf(path, sizeof path, "files_test_%d.safetensors", static_cast<int>(getpid()));
    if (!make(runtime, small_config(), model)) return;
    CHECK_OK(model.save(path));
    CHECK_OK(model.save(path));  // over itself
    CHECK_OK(loaded.load(runtime, path));
    CHECK(same(model, loaded));
    FILE* temporary = fopen((std::string(path) + ".tmp").c_str(), "rb");
    CHECK(!temporary);
    if (temporary) fclose(temporary);
    remove(path);
    CHECK(has(loaded.load(runtime, path), Error::cannot_open, path));
    CHECK(has(loaded.load(runtime, "."), Error::cannot_open, "folder"));
    CHECK(same(model, loaded));  // what failed to load changed nothing
    CHECK(!model.save("no/such/folder/model.safetensors").ok());
}

TEST(layout, "other programs could not read the file") {
    Host host;
    Model model;
    Config config = small_config();
    config.tied = false;
    if (!make(host.runtime, config, model)) return;
    const std::string file = saved(model), header = header_of(file);
    CHECK(header.size() % 8 == 0 && header[0] == '{');
    CHECK(header.find("{\"__metadata__\":{\"format\":\"pt\",\"babygpt.format_version\":\"1\",") == 0);
    const std::string vocab = std::to_string(config.vocab = model.config.vocab);
    CHECK(header.find("\"wte.weight\":{\"dtype\":\"F32\",\"shape\":[" + vocab + ",4],\"data_offsets\":[0,") != std::string::npos);
    CHECK(header.find("\"h.0.attn.c_attn.weight\":{\"dtype\":\"F32\",\"shape\":[4,12],") != std::string::npos);  // Conv1D: (in, out)
    CHECK(header.find("\"h.0.attn.c_attn.bias\":{\"dtype\":\"F32\",\"shape\":[12],") != std::string::npos);
    CHECK(header.find("\"lm_head.weight\":{\"dtype\":\"F32\",\"shape\":[" + vocab + ",4],") != std::string::npos);
    CHECK(header.find("\\\"n_embd\\\":4") != std::string::npos &&
          header.find("\\\"activation_function\\\":\\\"gelu_new\\\"") != std::string::npos);
    CHECK(data_of(file).size() == static_cast<size_t>(model.parameters) * 4);
    const Weight* first = model.find("wte.weight");
    CHECK(first && memcmp(data_of(file).data(), model.weights + first->offset, 16) == 0);
}

TEST(half_precision, "files of Hugging Face in F16 or BF16 would be read wrongly") {
    Host host;
    Config config = small_config();
    config.vocab = 65536 / config.width;
    Model model;
    if (!CHECK_OK(model.create(host.runtime, config, Tokenizer()))) return;
    const std::string file = saved(model);
    for (const char* dtype : {"F16", "BF16"}) {
        // The same file with every tensor half as large; the embedding holds every number of 16 bits once.
        std::string header = header_of(file), from = "\"F32\"", data;
        for (size_t at = 0; (at = header.find(from, at)) != std::string::npos;)
            header.replace(at, from.size(), std::string("\"") + dtype + "\"");
        for (size_t at = 0; (at = header.find("_offsets\":[", at)) != std::string::npos;) {
            const size_t start = at += 11, end = header.find(']', at);
            size_t comma = 0;
            const unsigned long low = std::stoul(header.substr(start), &comma), high = std::stoul(header.substr(start + comma + 1));
            header.replace(start, end - start, std::to_string(low / 2) + "," + std::to_string(high / 2));
        }
        for (unsigned i = 0; i < static_cast<unsigned>(model.parameters); ++i)
            data += static_cast<char>(i & 0xff), data += static_cast<char>(i >> 8 & 0xff);
        Model loaded;
        if (!CHECK_OK(loaded.load_memory(host.runtime, with_header(header, data)))) return;
        const float* values = loaded.weights + loaded.find("wte.weight")->offset;
        int wrong = 0;
        for (uint32_t i = 0; i < 65536; ++i) {
            // BF16 is the upper half of a float. F16 has 5 bits of exponent: the largest for infinity and NaN, the smallest for subnormals.
            const uint32_t sign = (i & 0x8000) << 16, fraction = i & 0x3ff;
            const int exponent = static_cast<int>(i >> 10 & 31);
            const float value = static_cast<float>(ldexp(exponent ? fraction + 1024 : fraction, (exponent ? exponent : 1) - 25));
            uint32_t expected = i << 16, found;
            if (dtype[0] == 'F') {
                if (exponent == 31) expected = 0x7f800000 | fraction << 13;
                else memcpy(&expected, &value, 4);
                expected |= sign;
            }
            memcpy(&found, values + i, 4);
            wrong += found != expected;
        }
        CHECK(wrong == 0);
    }
}

// ---- what fails ------------------------------------------------------------------------------------------------------

// Makes each call that writes fail in turn. The old file must survive all but the last (which comes after the rename).
template <class Save>
void fail_every_write(Host& host, const std::string& path, const Save& save) {
    const std::string old = "the old file";
    host.start_counting();
    host.files[path] = old;
    CHECK_OK(save());
    const int64_t calls = host.calls;
    const std::string fresh = host.files[path];
    const size_t files = host.files.size();
    CHECK(calls > 8 && fresh != old);
    bool seen_folder = false;
    for (int64_t i = 1; i <= calls; ++i) {
        host.start_counting();
        host.files[path] = old;
        host.fail_call = i;
        const Status status = save();
        seen_folder |= strcmp(host.failed, "sync_folder") == 0;
        CHECK(status.error == Error::cannot_write && strstr(status.message, path.c_str()));
        CHECK(host.files[path] == (strcmp(host.failed, "sync_folder") == 0 ? fresh : old));
        CHECK(host.files.size() == files && host.open_files == 0);
    }
    CHECK(seen_folder);
    host.start_counting();
}

TEST(every_write_fails, "a full disk would destroy the old checkpoint, or be taken for success") {
    Host host;
    Training t;
    if (!t.create(host, small_training()) || !t.steps(1)) return;
    fail_every_write(host, "m.safetensors", [&]() { return t.model.save("m.safetensors"); });
    fail_every_write(host, "m.resume.safetensors", [&]() { return t.trainer.save("m.resume.safetensors"); });
}

TEST(every_read_fails, "a disk that cannot be read, or reads little at a time, would give a wrong model") {
    Host host;
    Model model, loaded;
    if (!make(host.runtime, small_config(), model)) return;
    CHECK_OK(model.save("m"));
    host.start_counting();
    host.piece = 3;
    CHECK_OK(loaded.load(host.runtime, "m"));
    CHECK(same(model, loaded));
    host.piece = 1 << 20;
    host.start_counting();
    CHECK_OK(loaded.load(host.runtime, "m"));
    const int64_t reads = host.reads;
    CHECK(reads > 8);
    for (int64_t i = 1; i <= reads; ++i) {
        Model other;
        host.start_counting();
        host.fail_read = i;
        CHECK(has(other.load(host.runtime, "m"), Error::cannot_read, "'m'"));
        CHECK(other.weights == nullptr && host.open_files == 0);
    }
}

// Makes each allocation of a call fail in turn: a Status, and nothing leaked.
template <class Call>
void fail_every_allocation(Host& host, const Call& call) {
    host.start_counting();
    const int64_t blocks = host.blocks;
    CHECK_OK(call());
    const int64_t count = host.allocations;
    CHECK(count > 0 && host.blocks == blocks);
    for (int64_t i = 1; i <= count; ++i) {
        host.start_counting();
        host.fail_allocation = i;
        const Status status = call();
        if (!CHECK(status.error == Error::out_of_memory)) printf("  allocation %d: %s\n", static_cast<int>(i), status.message);
        CHECK(host.blocks == blocks && host.open_files == 0);
    }
    host.start_counting();
}

TEST(every_allocation_fails, "too little memory would crash, leak, or spoil a file") {
    Host host;
    {
        Training t;
        if (!t.create(host, small_training()) || !t.steps(2)) return;
        CHECK_OK(t.model.save("m"));
        CHECK_OK(t.trainer.save("r"));
        const std::string model_file = host.files["m"], resume_file = host.files["r"], before = t.snapshot();
        fail_every_allocation(host, [&]() {
            Model made;
            Config config = small_config();
            config.vocab = 5;
            const Status status = made.create(host.runtime, config, Tokenizer());
            CHECK(status.ok() == (made.state != nullptr) && status.ok() == (made.weights != nullptr));
            return status;
        });
        fail_every_allocation(host, [&]() { return t.model.save("m"); });
        fail_every_allocation(host, [&]() {
            Array<char> bytes;
            return t.model.save_memory(bytes);
        });
        fail_every_allocation(host, [&]() {
            Model loaded;
            return loaded.load_memory(host.runtime, model_file);
        });
        Model small;
        CHECK_OK(small.load(host.runtime, "m"));
        const std::string floats = saved(small);
        for (int64_t n = 1;; ++n) {  // all of it is rounded, or nothing
            host.start_counting();
            host.fail_allocation = n;
            const Status status = small.convert(Dtype::int8);
            host.fail_allocation = 0;
            if (status.ok()) break;
            if (!CHECK(status.error == Error::out_of_memory && saved(small) == floats)) break;
        }
        CHECK(small.config.dtype == Dtype::int8);
        fail_every_allocation(host, [&]() { return small.save("s"); });
        for (const Purpose purpose : {Purpose::training, Purpose::running})
            for (const char* path : {"m", "s"})
                fail_every_allocation(host, [&]() {
                    Model loaded;
                    return loaded.load(host.runtime, path, purpose);
                });
        host.files.erase("s");
        fail_every_allocation(host, [&]() { return t.trainer.save("r"); });
        fail_every_allocation(host, [&]() { return t.trainer.load("r"); });
        fail_every_allocation(host, [&]() {
            TrainConfig config;
            return read_train_config(host.runtime, "r", config);
        });
        fail_every_allocation(host, [&]() {
            Array<Difference> rows;
            return compare(t.model, t.model, rows);
        });
        CHECK(host.files["m"] == model_file && host.files["r"] == resume_file && host.files.size() == 2);
        CHECK(t.snapshot() == before);
    }
    CHECK(host.blocks == 0 && host.live == 0);
}

// ---- hostile files ---------------------------------------------------------------------------------------------------

TEST(wrong_files, "a file that is not what it should be would be taken, or refused without saying why") {
    Host host;
    Model model;
    if (!make(host.runtime, small_config(), model)) return;
    const std::string file = saved(model), header = header_of(file), data = data_of(file);
    const auto refused = [&](const std::string& bytes, Error error, const char* words) {
        Model loaded;
        host.start_counting();
        CHECK(has(loaded.load_memory(host.runtime, bytes), error, words));
        CHECK(loaded.weights == nullptr && host.total < memory_bound(bytes.size()));
    };
    const auto changed = [&](const char* from, const char* to, const char* words) {
        refused(with_header(replaced(header, from, to), data), Error::bad_file, words);
    };
    const std::string vocab = std::to_string(model.config.vocab), wte_end = std::to_string(model.config.vocab * 16);
    const std::string wte = "\"wte.weight\":{\"dtype\":\"F32\",\"shape\":[" + vocab + ",4],\"data_offsets\":[0," + wte_end + "]}";
    const auto changed_wte = [&](const std::string& to, const char* words) { changed(wte.c_str(), to.c_str(), words); };

    refused("", Error::bad_file, "only 0 bytes");
    refused("{\"a\":1}", Error::bad_file, "only 7 bytes");
    refused("once upon a time there was a file that was no model", Error::bad_file, "is no safetensors file");
    refused(with_header("{}", ""), Error::unsupported, "babygpt.format_version");
    refused(with_header(" {}     ", ""), Error::bad_file, "does not begin with '{'");
    refused(with_header("{\"\xff\":1}", ""), Error::bad_file, "not UTF-8 at byte 2");
    refused(file + "x", Error::bad_file, "something at its end");
    refused(file.substr(0, file.size() - 1), Error::bad_file, "cut short");
    refused(with_header(header + "x", data), Error::bad_file, "expected the end");
    refused(with_header(header.substr(0, 200), data), Error::bad_file, "the string does not end");

    // The header's grammar.
    changed_wte("\"wte.weight\":{\"dtype\":\"F32\"}", "expected dtype, shape and data_offsets");
    changed_wte("\"wte.weight\":{\"dtype\":\"F99\",\"shape\":[1]}", "only the dtypes");
    changed_wte("\"wte.weight\":{\"dtype\":\"F32\",\"dtype\":\"F32\"}", "twice");
    changed_wte("\"wte.weight\":{\"color\":\"F32\"}", "expected dtype, shape or data_offsets");
    changed_wte("\"wte.weight\":{\"shape\":[-1]}", "does not fit into memory");
    changed_wte("\"wte.weight\":{\"shape\":[4294967296,4294967296,4]}", "does not fit into memory");
    changed_wte("\"wte.weight\":{\"shape\":[1.5]}", "whole number");
    changed_wte("\"wte.weight\":{\"data_offsets\":[0]}", "expected two offsets");
    changed_wte("\"wte.weight\":{\"data_offsets\":[0,1,2]}", "expected two offsets");
    changed_wte("\"wte.weight\":{\"data_offsets\":[0,18446744073709551616]}", "64 bits");
    changed("\"format\":\"pt\"", "\"format\":{\"is\":\"pt\"}", "expected a string, as all metadata are");
    changed("\"format\":\"pt\"", "\"format\":\"pt\",\"\\u0066ormat\":\"tf\"", "two metadata 'format'");
    changed("{\"__metadata__\":{", "{\"__metadata__\":{},\"__metadata__\":{", "__metadata__ stands here twice");
    const std::string none = "\"none\":{\"dtype\":\"F32\",\"shape\":[7,0],\"data_offsets\":[0,0]}";
    changed_wte(none + "," + none + "," + wte, "two tensors 'none'");
    changed_wte(wte + "," + wte, "'wte.weight' begins at byte 0, but the one before it ends at");

    // Where the tensors lie.
    changed_wte("\"wte.weight\":{\"dtype\":\"F32\",\"shape\":[" + vocab + ",4],\"data_offsets\":[0,8]}", "'wte.weight' has the shape [");
    changed_wte("\"wte.weight\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}", "'wte.weight' has the shape [2]");
    changed_wte("\"wte.weight\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}", "'wpe.weight' begins at byte");
    changed_wte("\"wte.weight\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[18446744073709551615,18446744073709551615]}",
                "begins at byte");
    changed_wte(wte + "," + none, "has a tensor 'none' of shape [7,0]");
    changed_wte(wte + ",\"a\\u001b[2J\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}", "'a?[2J'");  // would clear a terminal
    changed_wte("\"wte.weighs\":{\"dtype\":\"F32\",\"shape\":[" + vocab + ",4],\"data_offsets\":[0," + wte_end + "]}",
                "lacks the tensor 'wte.weight' of shape [");
    changed_wte("\"wte.weight\":{\"dtype\":\"F32\",\"shape\":[4," + vocab + "],\"data_offsets\":[0," + wte_end + "]}",
                (", but its config wants [" + vocab + ", 4]").c_str());
    changed_wte("\"wte.weight\":{\"dtype\":\"F32\",\"shape\":[" + vocab + ",4,1],\"data_offsets\":[0," + wte_end + "]}",
                ", but its config wants [");

    // The config and what stands beside it.
    refused(with_header(replaced(header, "format_version\":\"1\"", "format_version\":\"2\""), data), Error::unsupported,
            "format version 2, but this program knows only 1");
    refused(with_header(replaced(header, "babygpt.config", "babygpt.conflict"), data), Error::unsupported, "'babygpt.config'");
    changed("\\\"n_layer\\\":1", "\\\"n_layer\\\":0", "layers is 0");
    changed("\\\"n_layer\\\":1", "\\\"n_layer\\\":1000", "too few for the 1000 layers");
    changed("\\\"n_layer\\\":1", "\\\"n_layer\\\":4294967297", "at most 32 bits");
    changed("\\\"n_layer\\\":1", "\\\"n_layer\\\":2", "lacks the tensor 'h.1.");
    changed("\\\"n_embd\\\":4", "\\\"n_embd\\\":65536", "wte.weight");
    changed("\\\"n_embd\\\":4,", "", "lacks 'n_embd'");
    changed("\\\"n_embd\\\":4,", "\\\"n_embd\\\":4,\\\"n_embd\\\":4,", "twice");
    changed("gelu_new", "mish", "activation function");
    changed("\\\"gpt2\\\"", "\\\"bert\\\"", "model_type");
    changed("1e-05", "0", "norm_epsilon is 0");
    changed("\\\"tie_word_embeddings\\\":true", "\\\"tie_word_embeddings\\\":false", "lacks the tensor 'lm_head.weight'");
    changed("\\\"bias\\\":true", "\\\"bias\\\":false", "which its config does not know");
    changed("\\\"user_turn\\\":", "\\\"user_turn\\\"", "babygpt.chat");
}

TEST(wrong_int8, "numbers without a scale would be taken, or scales of another program be read otherwise by each backend") {
    Host host;
    Model model, loaded;
    Config config = small_config();
    config.dtype = Dtype::int8;
    if (!make(host.runtime, config, model)) return;
    const std::string file = saved(model), header = header_of(file), data = data_of(file);
    CHECK(header.find("\"h.0.attn.c_attn.weight\":{\"dtype\":\"I8\",\"shape\":[4,12],") != std::string::npos);
    CHECK(header.find("\"h.0.attn.c_attn.weight_scale\":{\"dtype\":\"F32\",\"shape\":[12],") != std::string::npos);
    const auto changed = [&](const char* from, const char* to, const char* complaint) {
        std::string other = header;
        const size_t at = other.find(from);
        if (!CHECK(at != std::string::npos)) return;
        other.replace(at, strlen(from), to);
        CHECK(has(loaded.load_memory(host.runtime, with_header(other, data)), Error::bad_file, complaint));
    };
    changed("c_attn.weight_scale", "c_attn.weight_skale", "lacks the tensor 'h.0.attn.c_attn.weight_scale' of shape [12]");
    changed("c_attn.weight_scale\":{\"dtype\":\"F32\",\"shape\":[12]", "c_attn.weight_scale\":{\"dtype\":\"F32\",\"shape\":[3,4]",
            "has the shape");
    changed("\\\"dtype\\\":\\\"int8\\\"", "\\\"dtype\\\":\\\"int4\\\"", "dtype must be float32, bfloat16 or int8");
    // A scale that is no power of two: the numbers are rounded anew, and are then as if they had been converted here.
    const size_t place = header.find("[", header.find("data_offsets", header.find("c_attn.weight_scale"))) + 1;
    std::string other = data;
    const float scale = 0.01f, wrong = NAN;
    memcpy(&other[std::stoul(header.substr(place))], &scale, sizeof scale);
    CHECK_OK(loaded.load_memory(host.runtime, with_header(header, other)));
    const std::string rounded = saved(loaded);
    CHECK_OK(loaded.convert(Dtype::int8));
    CHECK(saved(loaded) == rounded);
    memcpy(&other[std::stoul(header.substr(place))], &wrong, sizeof wrong);
    for (const Purpose purpose : {Purpose::training, Purpose::running})
        CHECK(has(loaded.load_memory(host.runtime, with_header(header, other), purpose), Error::bad_file, "not finite"));
}

TEST(cut_files, "a file that was cut short would crash or be taken for a model") {
    Host host;
    Model model;
    if (!make(host.runtime, small_config(), model)) return;
    const auto cut = [&](const std::string& file, size_t size) {
        const std::vector<char> exact(file.data(), file.data() + size);  // so that a sanitizer sees a byte too far
        Model loaded;
        host.start_counting();
        const Purpose purpose = size % 2 ? Purpose::training : Purpose::running;
        const Status status = loaded.load_memory(host.runtime, Text(exact.data(), exact.size()), purpose);
        return CHECK(!status.ok() && status.message[0] && host.total < memory_bound(size));
    };
    const std::string file = saved(model);
    CHECK(file.size() <= 8192);
    for (size_t size = 0; size < file.size(); ++size)
        if (!cut(file, size)) return;
    CHECK_OK(model.convert(Dtype::int8));
    const std::string in_int8 = saved(model);
    for (size_t size = 0; size < in_int8.size(); ++size)
        if (!cut(in_int8, size)) return;
    Config nano;
    if (!CHECK_OK(preset("nano", nano)) || !make(host.runtime, nano, model)) return;
    const std::string larger = saved(model);
    uint64_t random = 11;
    for (int i = 0; i < 1000; ++i)
        if (!cut(larger, next_random(random) % larger.size())) return;
}

void load_mutations(Dtype dtype, const char* architecture) {
    Host host;
    Model model;
    Config config = small_config();
    CHECK_OK(preset_architecture(architecture, config));
    config.dtype = dtype;
    if (!make(host.runtime, config, model)) return;
    const std::string file = saved(model);
    const int64_t blocks = host.blocks;
    uint64_t random = 20260101;
    int loaded_well = 0;
    for (int round = 0; round < 20000; ++round) {
        std::string bytes = file;
        // Mostly the header, where the grammar is; now and then anywhere.
        const size_t range = next_random(random) % 8 ? header_of(file).size() + 8 : file.size();
        for (uint64_t edits = 1 + next_random(random) % 3; edits > 0; --edits) {
            const size_t at = next_random(random) % range % bytes.size(), other = next_random(random) % range % bytes.size(),
                         length = next_random(random) % 24;
            switch (next_random(random) % 8) {
                case 0:
                    bytes[at] = static_cast<char>(next_random(random));
                    break;
                case 1:
                    bytes[at] = static_cast<char>(bytes[at] ^ 1 << next_random(random) % 7);
                    break;  // mostly UTF-8 still
                case 2:
                    bytes[at] = "0123456789{}[]\",:\\-e"[next_random(random) % 20];
                    break;
                case 3:
                    bytes.insert(at, bytes.substr(other, length));
                    break;
                case 4:
                    bytes.erase(at, length);
                    break;
                case 5:
                    bytes.replace(at, length, bytes.substr(other, length));
                    break;
                default:  // a letter or digit by another: the grammar stays whole
                    if (isalnum(static_cast<unsigned char>(bytes[at]))) bytes[at] = "0123456789abcdefpnlrtxy"[next_random(random) % 23];
            }
            if (bytes.empty()) bytes = "x";
        }
        if (next_random(random) % 2 && bytes.size() > 8) {  // let the header's length fit again, to come further
            const size_t length = header_of(file).size() + bytes.size() - file.size();
            for (size_t i = 0; i < 8; ++i) bytes[i] = static_cast<char>(static_cast<uint64_t>(length) >> (8 * i) & 0xff);
        }
        Model loaded;
        host.start_counting();
        const std::vector<char> exact(bytes.begin(), bytes.end());
        const Purpose purpose = round % 2 ? Purpose::training : Purpose::running;
        const Status status = loaded.load_memory(host.runtime, Text(exact.data(), exact.size()), purpose);
        loaded_well += status.ok();
        if (!CHECK(status.ok() == (loaded.state != nullptr)) || !CHECK(status.ok() || status.message[0]) ||
            !CHECK(host.total < memory_bound(bytes.size())))
            return;
    }
    CHECK(loaded_well > 100 && loaded_well < 19000);  // the mutations reach beyond the first check, and do change something
    CHECK(host.blocks == blocks);
}

TEST(mutated_files, "a damaged file could crash, hang or take all memory") {
    load_mutations(Dtype::f32, "gpt2");
    load_mutations(Dtype::int8, "gpt2");
    load_mutations(Dtype::f32, "llama");
}

TEST(large_claims, "a small file could make the reader allocate or work without end") {
    Host host;
    // Many tensors with long, nearly equal names, in the worst order.
    std::string header = "{";
    for (int i = 0; i < 20000; ++i)
        header += "\"" + std::string(100, 'a') + std::to_string(i) + "\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]},";
    header.back() = '}';
    Model loaded;
    host.start_counting();
    const std::string file = with_header(header, "");
    CHECK(has(loaded.load_memory(host.runtime, file), Error::unsupported, "babygpt.format_version"));
    CHECK(host.total < memory_bound(file.size()));
    // Deep nesting where any value may stand.
    const std::string deep(100000, '[');
    const std::string start = "{\"__metadata__\":{\"babygpt.format_version\":\"1\",\"babygpt.config\":\"{\\\"x\\\":";
    CHECK(has(loaded.load_memory(host.runtime, with_header(start + deep + "\"}}", "")), Error::bad_file, "deeper than 64"));
    CHECK(!loaded.load_memory(host.runtime, with_header("{\"a\":{\"shape\":" + deep, "")).ok());
    // A config or a rank that wants far more than the file has.
    Model model;
    Adapter adapter;
    if (!make(host.runtime, small_config(), model)) return;
    const auto refused = [&](const std::string& bytes, const char* words, bool is_adapter) {
        host.files["x"] = bytes;
        host.start_counting();
        CHECK(has(is_adapter ? adapter.load(host.runtime, model, "x") : loaded.load(host.runtime, "x"), Error::bad_file, words));
        CHECK(host.total < memory_bound(bytes.size()));
    };
    const std::string few = saved(model);
    refused(with_header(replaced(header_of(few), "\\\"n_layer\\\":1", "\\\"encoder_layers\\\":1000,\\\"n_layer\\\":1"), data_of(few)),
            "too few for the 1001 layers", false);
    CHECK_OK(adapter.create(host.runtime, model, {2, 4, ""}));
    CHECK_OK(adapter.save("a"));
    const std::string small = host.files["a"];
    refused(with_header(replaced(header_of(small), "\\\"r\\\":2", "\\\"r\\\":65536"), data_of(small)), "rank 65536", true);
}

// ---- other people's files --------------------------------------------------------------------------------------------

namespace {

// A model of two layers, of a type that other programs know.
Config foreign_config(const char* architecture) {
    Config config = small_config();
    CHECK_OK(preset_architecture(architecture, config));
    config.layers = 2, config.heads = 2, config.hidden = 6, config.vocab = 7;
    if (config.gated) config.width = 8, config.kv_heads = 1;
    return config;
}
bool make_foreign(Host& host, const Config& config, Model& model) { return CHECK_OK(model.create(host.runtime, config, Tokenizer(), 5)); }

// The same model with its tensors in two files, and an index.
void split(std::map<std::string, std::string>& files) {
    const std::string file = files["f/model.safetensors"], header = header_of(file), data = data_of(file);
    const size_t middle = header.find("},\"", header.size() / 2) + 1;
    const std::string key = "\"data_offsets\":[";
    std::string rest = header.substr(middle + 1);
    const size_t cut = std::stoul(rest.substr(rest.find(key) + key.size()));
    std::string second = "{";
    for (size_t at = 0, next; (next = rest.find(key, at)) != std::string::npos;) {
        next += key.size();
        size_t end = 0;
        const size_t from = std::stoul(rest.substr(next), &end), comma = next + end + 1, to = std::stoul(rest.substr(comma));
        second += rest.substr(at, next - at) + std::to_string(from - cut) + "," + std::to_string(to - cut) + "]";
        at = rest.find(']', comma) + 1;
        if (rest.find(key, at) == std::string::npos) second += "}}";
    }
    files["f/a.safetensors"] = with_header(header.substr(0, middle) + "}", data.substr(0, cut));
    files["f/b.safetensors"] = with_header(second, data.substr(cut));
    files["f/model.safetensors.index.json"] =
        "{\"metadata\":{},\"weight_map\":{\"x\":\"a.safetensors\",\"y\":\"b.safetensors\",\"z\":\"a.safetensors\"}}";
    files.erase("f/model.safetensors");
}

}  // namespace

TEST(huggingface_folders, "a model would not come back from Hugging Face's form as it was, or damage in it would crash or be taken") {
    for (const char* architecture : {"gpt2", "llama"})
        for (const bool tied : {true, false}) {
            Host host;
            Config config = foreign_config(architecture);
            config.tied = tied;
            Model model, loaded;
            if (!make_foreign(host, config, model)) return;
            CHECK_OK(model.save_huggingface("f"));
            CHECK(host.files.size() == 2);
            CHECK_OK(loaded.load(host.runtime, "f"));
            CHECK(same(model, loaded));
            // With what other programs leave beside the weights.
            const std::string plain = host.files["f/model.safetensors"];
            for (const char* dtype : {"U8", "BOOL", "F32"}) {
                const std::string data = data_of(plain), end = std::to_string(data.size() + (*dtype == 'F' ? 16 : 4));
                const std::string mask = "{\"transformer.h.0.attn.bias\":{\"dtype\":\"" + std::string(dtype) +
                                         "\",\"shape\":[1,1,2,2],\"data_offsets\":[" + std::to_string(data.size()) + "," + end + "]},";
                host.files["f/model.safetensors"] =
                    with_header(replaced(header_of(plain), "{", mask), data + std::string(*dtype == 'F' ? 16 : 4, '\1'));
                Model masked;
                CHECK_OK(masked.load(host.runtime, "f"));
                CHECK(same(model, masked));
            }
            host.files["f/model.safetensors"] = with_header(replaced(header_of(plain), "\"F32\"", "\"U8\""), data_of(plain));
            CHECK(!loaded.load(host.runtime, "f").ok() && same(model, loaded));
            host.files["f/model.safetensors"] = plain;
            // In two pieces, of which one is cut or missing.
            split(host.files);
            for (const size_t size : {174u, 175u, 200u}) {  // of a long name, too
                const std::string name(size - 12, 'n'), index = host.files["f/model.safetensors.index.json"];
                host.files["f/" + name + ".safetensors"] = host.files["f/b.safetensors"];
                host.files["f/model.safetensors.index.json"] = replaced(index, "\"b.", "\"" + name + ".");
                Model pieces;
                CHECK_OK(pieces.load(host.runtime, "f"));
                host.files.erase("f/" + name + ".safetensors");
                host.files["f/model.safetensors.index.json"] = index;
            }
            Model pieces;
            CHECK_OK(pieces.load(host.runtime, "f"));
            CHECK(same(model, pieces));
            const std::map<std::string, std::string> whole = host.files;
            for (const char* name : {"f/config.json", "f/model.safetensors.index.json", "f/a.safetensors", "f/b.safetensors"}) {
                const std::string& file = whole.at(name);
                const size_t step = file.size() > 600 && thoroughness() == 1 ? 7 : 1;
                for (size_t size = 0; size + 2 < file.size(); size += step) {
                    host.files[name] = file.substr(0, size);
                    Model cut;
                    const Status status = cut.load(host.runtime, "f");
                    if (!CHECK(!status.ok() && status.message[0] && !cut.weights)) return;
                }
                host.files = whole;
                host.files.erase(name);
                Model absent;
                CHECK(!absent.load(host.runtime, "f").ok());
                host.files = whole;
                uint64_t random = 77;
                for (int round = 0; round < 1500 * thoroughness(); ++round) {
                    std::string& bytes = host.files[name] = file;
                    for (uint64_t edits = 1 + next_random(random) % 3; edits > 0; --edits) {
                        const size_t at = next_random(random) % bytes.size();
                        if (next_random(random) % 2) bytes[at] = "0123456789{}[]\",:\\-e"[next_random(random) % 20];
                        else bytes.erase(at, next_random(random) % 9);
                        if (bytes.empty()) bytes = "x";
                    }
                    Model damaged;
                    host.start_counting();
                    const Status status = damaged.load(host.runtime, "f");
                    if (!CHECK(status.ok() == (damaged.weights != nullptr)) || !CHECK(status.ok() || status.message[0]) ||
                        !CHECK(host.total < 4 * memory_bound(whole.at("f/a.safetensors").size() + bytes.size())))
                        return;
                }
                host.files = whole;
            }
            CHECK(host.open_files == 0);
        }
}

TEST(folder_survives, "a disk that is full would leave a folder with the weights of one model and the config of another") {
    Host host;
    Model old, fresh;
    if (!make(host.runtime, foreign_config("llama"), old)) return;
    Config other = foreign_config("llama");
    other.rope_base = 500000;
    if (!make(host.runtime, other, fresh, 2)) return;
    CHECK_OK(old.save_huggingface("f"));
    const std::map<std::string, std::string> whole = host.files;
    host.start_counting();
    CHECK_OK(fresh.save_huggingface("f"));
    const int64_t calls = host.calls;
    CHECK(calls > 15 && host.files.size() == 3);
    int kept = 0;
    for (int64_t n = 1; n <= calls; ++n) {
        host.files = whole;
        host.start_counting();
        host.fail_call = n;
        CHECK(fresh.save_huggingface("f").error == Error::cannot_write && host.files.size() == 3);
        if (strcmp(host.failed, "open") == 0 || strcmp(host.failed, "write") == 0 || strcmp(host.failed, "sync") == 0 ||
            strcmp(host.failed, "close") == 0)
            ++kept, CHECK(host.files == whole);
    }
    CHECK(kept > 10);
}

TEST(foreign_allocations_fail, "too little memory or a failing disk would crash or leak while other people's files are read and written") {
    Host host;
    Model model;
    if (!make_foreign(host, foreign_config("llama"), model)) return;
    CHECK_OK(model.save_huggingface("f"));
    CHECK_OK(model.save_llama2c("m.bin"));
    split(host.files);
    const std::map<std::string, std::string> whole = host.files;
    const int64_t blocks = host.blocks;
    for (const char* path : {"f", "m.bin"})
        for (int what = 0; what < 4; ++what)
            for (int64_t n = 1;; ++n) {
                Model loaded;
                host.start_counting();
                (what % 2 ? host.fail_read : host.fail_allocation) = n;
                const Status status = loaded.load(host.runtime, path, what < 2 ? Purpose::training : Purpose::running);
                const bool reached = (what % 2 ? host.reads : host.allocations) >= n;
                if (!CHECK(status.ok() == !reached && status.ok() == (loaded.state != nullptr) && host.open_files == 0) || !reached) break;
            }
    for (const char* path : {"f", "m.bin"})
        for (int what = 0; what < 2; ++what)
            for (int64_t n = 1;; ++n) {
                host.start_counting();
                (what ? host.fail_call : host.fail_allocation) = n;
                const Status status = strcmp(path, "f") ? model.save_llama2c(path) : model.save_huggingface(path);
                const bool reached = (what ? host.calls : host.allocations) >= n;
                if (!CHECK(status.ok() == !reached && host.open_files == 0) || !reached) break;
            }
    CHECK(host.blocks == blocks && host.files.at("m.bin") == whole.at("m.bin"));
}

TEST(huggingface_configs, "a config that means another model would be taken for one that we know") {
    Host host;
    Model model;
    if (!make_foreign(host, foreign_config("llama"), model)) return;
    CHECK_OK(model.save_huggingface("f"));
    const std::string config = host.files["f/config.json"];
    const auto loads = [&](const char* from, const char* to, const char* complaint) {
        host.files["f/config.json"] = replaced(config, from, to);
        Model loaded;
        const Status status = loaded.load(host.runtime, "f");
        if (complaint) CHECK(!status.ok() && strstr(status.message, complaint));
        else CHECK_OK(status);
        return loaded.config;
    };
    loads("{", "{\"rope_scaling\":null,\"head_dim\":4,\"pad_token_id\":null,", nullptr);
    loads("{", "{\"rope_scaling\":{\"type\":\"linear\"},", "rope_scaling");
    loads("{", "{\"head_dim\":2,", "head_dim is 2");
    loads("\"mlp_bias\":false", "\"mlp_bias\":true", "mlp_bias");
    loads("\"llama\"", "\"mistral\"", "model_type");
    loads("\"silu\"", "\"mish\"", "activation function");
    loads("\"dtype\":\"float32\"", "\"dtype\":\"float16\"", nullptr);
    CHECK(loads("\"rope_theta\":10000", "\"rope_theta\":500000.0", nullptr).rope_base == 500000);
    CHECK(loads("\"rope_theta\":10000", "\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":77.0}", nullptr).rope_base == 77);
    loads("{", "{\"rope_parameters\":{\"rope_type\":\"yarn\"},", "rope_type");
    loads("\"intermediate_size\":6,", "", "lacks 'intermediate_size'");
    Model plain, untyped;
    if (!make_foreign(host, foreign_config("gpt2"), plain)) return;
    CHECK_OK(plain.save_huggingface("g"));
    host.files["g/config.json"] = replaced(host.files["g/config.json"], "\"model_type\":\"gpt2\"", "\"model_type\":null");
    CHECK_OK(untyped.load(host.runtime, "g"));
    Config other = foreign_config("llama");
    other.norm_after = true;
    Model unusual;
    if (make_foreign(host, other, unusual)) CHECK(!unusual.save_huggingface("g").ok() && !unusual.save_llama2c("g.bin").ok());
}

TEST(llama2c_files, "a model would not come back from llama2.c's form as it was, or a damaged file would crash") {
    for (const bool tied : {true, false}) {
        Host host;
        Config config = foreign_config("llama");
        config.tied = tied;
        Model model, loaded;
        if (!make_foreign(host, config, model)) return;
        CHECK_OK(model.save_llama2c("m.bin"));
        const std::string file = host.files["m.bin"];
        CHECK_OK(loaded.load(host.runtime, "m.bin"));
        CHECK(same(model, loaded));
        for (size_t size = 0; size < file.size(); ++size) {
            const std::vector<char> exact(file.data(), file.data() + size);
            Model cut;
            if (!CHECK(!cut.load_memory(host.runtime, Text(exact.data(), exact.size())).ok())) return;
        }
        uint64_t random = 3;
        for (int round = 0; round < 20000; ++round) {
            std::string bytes = file;
            for (uint64_t edits = 1 + next_random(random) % 2; edits > 0; --edits)
                bytes[next_random(random) % (next_random(random) % 4 ? 28 : bytes.size())] = static_cast<char>(next_random(random));
            Model damaged;
            host.start_counting();
            const Status status = damaged.load_memory(host.runtime, bytes);
            if (!CHECK(status.ok() == (damaged.weights != nullptr)) || !CHECK(host.total < memory_bound(bytes.size()))) return;
        }
        CHECK(host.open_files == 0);
    }
}

TEST(real_llama2c_file, "a download that broke off could crash, or be taken for the whole model") {
    std::string whole;
    FILE* file = fopen("../shared/data/models/stories260K/stories260K.bin", "rb");
    if (!file) SKIP("../shared is not here");
    char buffer[65536];
    for (size_t n; (n = fread(buffer, 1, sizeof buffer, file)) > 0;) whole.append(buffer, n);
    fclose(file);
    Host host;
    uint64_t random = 5;
    for (int round = 0; round < 1000; ++round) {
        const std::vector<char> exact(whole.data(), whole.data() + next_random(random) % whole.size());
        Model cut;
        if (!CHECK(!cut.load_memory(host.runtime, Text(exact.data(), exact.size())).ok())) return;
    }
    Model all;
    CHECK_OK(all.load_memory(host.runtime, whole));
}

// ---- GGUF ------------------------------------------------------------------------------------------------------------

namespace {

// The bytes of a little-endian number.
std::string little(uint64_t value, int size) {
    std::string bytes;
    for (int i = 0; i < size; ++i) bytes += static_cast<char>(i < 8 ? value >> (8 * i) & 0xff : 0);
    return bytes;
}
// With another value behind a key; both as they stand in the file, type included.
std::string with_value(const std::string& file, const std::string& key, const std::string& from, const std::string& to) {
    return replaced(file, little(key.size(), 8) + key + from, little(key.size(), 8) + key + to);
}
std::string u32(uint64_t value) { return little(4, 4) + little(value, 4); }
std::string f32(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return little(6, 4) + little(bits, 4);
}
std::string gguf_text(const std::string& text) { return little(8, 4) + little(text.size(), 8) + text; }

// A SentencePiece BPE tokenizer with bytes, by way of llama2.c's file.
std::string piece_file() {
    const std::string pieces[] = {"<unk>", "\n<s>\n", "\n</s>\n"}, words[] = {" ", "a", "b", "ab", " a", " ab"};
    std::string file = little(6, 4);
    const auto add = [&](const std::string& piece, float score) { file += f32(score).substr(4) + little(piece.size(), 4) + piece; };
    for (const std::string& piece : pieces) add(piece, 0);
    for (int byte = 0; byte < 256; ++byte) {
        char name[8];
        snprintf(name, sizeof name, "<0x%02X>", static_cast<unsigned>(byte));
        add(name, 0);
    }
    for (size_t i = 0; i < 6; ++i) add(words[i], -static_cast<float>(i));
    return file;
}
bool make_tokenizer(Host& host, const std::string& kind, Tokenizer& tokenizer) {
    TokenizerConfig config;
    if (kind == "none") return true;
    if (kind == "pieces") {
        host.files["t.bin"] = piece_file();
        const bool good = CHECK_OK(tokenizer.load(host.runtime, "t.bin"));
        host.files.erase("t.bin");
        return good;
    }
    CHECK_OK(parse_tokenizer(kind, config));
    return CHECK_OK(tokenizer.train(host.runtime, config, Text("abc abd abe \xc5\x9f")));
}
bool make_gguf(Host& host, const char* architecture, const char* kind, Model& model, int width = 8, bool tied = true) {
    Config config = small_config();
    CHECK_OK(preset_architecture(architecture, config));
    config.heads = 2, config.layers = 2, config.width = width, config.hidden = width == 8 ? 6 : 2 * width, config.tied = tied,
    config.vocab = 0;
    if (config.gated) config.kv_heads = 1, config.norm_epsilon = 1e-6, config.rope_base = 5e4, config.bias = tied;
    Tokenizer tokenizer;
    if (!make_tokenizer(host, kind, tokenizer)) return false;
    config.vocab = tokenizer.vocab + 3;
    return CHECK_OK(model.create(host.runtime, config, static_cast<Tokenizer&&>(tokenizer), 5)) &&
           CHECK_OK(model.set_chat("You: ", "\xc5\x9e: "));
}

}  // namespace

TEST(gguf_round_trip, "a model would not come back from GGUF as it was") {
    for (const char* architecture : {"gpt2", "llama"})
        for (const char* kind : {"none", "byte", "char", "bpe:260", "wordpiece:40", "pieces"})
            for (const bool tied : {true, false})
                for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::int8}) {
                    Host host;
                    Model model, loaded, again;
                    if (!make_gguf(host, architecture, kind, model, dtype == Dtype::int8 ? 32 : 8, tied)) return;
                    if (dtype != Dtype::f32) CHECK_OK(model.convert(dtype));
                    CHECK_OK(model.save_gguf("m.gguf"));
                    CHECK_OK(loaded.load(host.runtime, "m.gguf"));
                    CHECK(loaded.config.dtype == Dtype::f32 && same_tensors(model, loaded) && same_config(model.config, loaded.config));
                    const std::string file = host.files["m.gguf"];
                    // Pieces that fill the vocabulary up come back as unused ones.
                    if (strcmp(kind, "pieces")) CHECK(same(model, loaded));
                    else CHECK(loaded.tokenizer.vocab == loaded.config.vocab && bytes_of(loaded.chat.reply_turn) == "\xc5\x9e: ");
                    Array<int32_t> ids, other;
                    if (strcmp(kind, "none")) {
                        CHECK_OK(model.tokenizer.encode("ab abc \xe2\x82\xac\n", ids, true));
                        CHECK_OK(loaded.tokenizer.encode("ab abc \xe2\x82\xac\n", other, true));
                        CHECK(ids.count == other.count && memcmp(ids.items, other.items, ids.count * sizeof(int32_t)) == 0);
                        Tokenizer alone;
                        CHECK_OK(alone.load(host.runtime, "m.gguf"));
                        CHECK(text_of(alone) == text_of(loaded.tokenizer));
                    }
                    if (dtype != Dtype::f32) CHECK_OK(loaded.convert(dtype));
                    CHECK_OK(loaded.save_gguf("again.gguf"));
                    CHECK(host.files["again.gguf"] == file || strcmp(kind, "pieces") == 0);
                }
}

TEST(plain_words_alone, "a trainer would refuse its own resume file where a text is plain words without turns") {
    Host host;
    Model model, loaded;
    if (!make(host.runtime, foreign_config("gpt2"), model)) return;
    CHECK_OK(model.set_chat("", "", true));
    CHECK_OK(model.save("m"));
    CHECK_OK(model.save_gguf("m.gguf"));
    for (const char* path : {"m", "m.gguf"}) {
        CHECK_OK(loaded.load(host.runtime, path));
        CHECK(loaded.chat.plain_words && loaded.chat.empty());
    }
}

TEST(gguf_in_a_host, "a host that rounds another way would get another file") {
    Host host;
    Model model;
    if (!make_gguf(host, "llama", "pieces", model)) return;
    CHECK_OK(model.save_gguf("m.gguf"));
    CHECK(fesetround(FE_UPWARD) == 0);
    CHECK_OK(model.save_gguf("up.gguf"));
    fesetround(FE_TONEAREST);
    CHECK(host.files["up.gguf"] == host.files["m.gguf"]);
}

TEST(begin_of_text_in_files,
     "what stands before each text would be lost between GGUF, folders and checkpoints, or other than llama.cpp has it") {
    Host host;
    Model model, loaded, again;
    if (!make_gguf(host, "llama", "pieces", model)) return;
    CHECK(model.tokenizer.begin_of_text == 1 && model.tokenizer.end_of_text == 1);
    CHECK_OK(model.save_gguf("m.gguf"));
    const std::string adds = "tokenizer.ggml.add_bos_token", id = "tokenizer.ggml.bos_token_id", yes = little(7, 4) + '\1',
                      no = little(7, 4) + '\0', file = with_value(host.files["m.gguf"], "tokenizer.ggml.eos_token_id", u32(1), u32(2)),
                      no_word = replaced(file, adds, "tokenizer.ggml.add_bos_tokem");
    const auto begins_with = [&](const std::string& bytes, int32_t begin) {
        if (!CHECK_OK(loaded.load_memory(host.runtime, bytes))) return;
        CHECK(loaded.tokenizer.begin_of_text == begin);
        CHECK_OK(again.load_memory(host.runtime, saved(loaded)));
        CHECK(again.tokenizer.begin_of_text == begin && same(loaded, again));
        CHECK_OK(loaded.save_huggingface("f"));
        CHECK_OK(again.load(host.runtime, "f"));
        CHECK(again.tokenizer.begin_of_text == begin);
        CHECK_OK(loaded.save_gguf("again.gguf"));
        CHECK_OK(again.load(host.runtime, "again.gguf"));
        CHECK(again.tokenizer.begin_of_text == begin && again.tokenizer.end_of_text == loaded.tokenizer.end_of_text);
    };
    begins_with(file, 1);
    CHECK(loaded.tokenizer.end_of_text == 2);
    begins_with(with_value(file, adds, yes, no), -1);
    begins_with(with_value(file, id, u32(1), u32(2)), 2);
    begins_with(no_word, 1);  // llama.cpp's rule for SentencePiece's BPE
    begins_with(replaced(no_word, id, "tokenizer.ggml.bos_token_ib"), 1);
    for (const uint64_t wrong : {0u, 3u, 1u << 30, ~0u})
        CHECK(has(loaded.load_memory(host.runtime, with_value(file, id, u32(1), u32(wrong))), Error::bad_file,
                  "tokenizer.ggml.bos_token_id"));
    if (!make_gguf(host, "llama", "bpe:260", model)) return;
    CHECK_OK(model.save_gguf("m.gguf"));
    const std::string bpe = host.files["m.gguf"];
    begins_with(bpe, -1);
    begins_with(replaced(bpe, adds, "tokenizer.ggml.add_bos_tokem"), -1);
    begins_with(with_value(bpe, adds, no, yes), 259);
    // A folder with a .model beside which tokenizer_config.json says it, or says nothing.
    if (!make_gguf(host, "llama", "pieces", model)) return;
    CHECK_OK(model.save_huggingface("f"));
    CHECK_OK(model.tokenizer.save("f/tokenizer.model"));
    host.files.erase("f/tokenizer.json");
    const auto beside = [&](const char* json) {
        if (json) host.files["f/tokenizer_config.json"] = json;
        const Status status = loaded.load(host.runtime, "f");
        return status.ok() ? loaded.tokenizer.begin_of_text : -100 - static_cast<int>(status.error);
    };
    CHECK(beside(nullptr) == 1 && beside("{}") == 1 && beside("{\"add_bos_token\":null,\"x\":[{}]}") == 1);
    CHECK(beside("{\"add_bos_token\":false}") == -1 && beside("{\"bos_token\":null}") == -1 && beside("{\"bos_token\":\"<x>\"}") == -1);
    CHECK(beside("{\"add_bos_token\":true,\"bos_token\":{\"content\":\"</s>\",\"lstrip\":false}}") == 2 &&
          beside("{\"bos_token\":\"</s>\"}") == 2);
    CHECK(beside("{\"add_bos_token\":true,\"bos_token\":\"<x>\"}") == -100 - static_cast<int>(Error::bad_file));
    CHECK(beside("{\"add_bos_token\":") == -100 - static_cast<int>(Error::bad_file));
    CHECK_OK(model.tokenizer.load(host.runtime, "f/tokenizer.model"));
    CHECK(model.tokenizer.begin_of_text == -1);
    // Llama's tokenizer.json, BPE with byte fallback, is not read; the .model beside it says the same.
    host.files["f/tokenizer.json"] =
        "{\"added_tokens\":[],\"normalizer\":null,\"pre_tokenizer\":null,\"model\":{\"type\":\"BPE\",\"byte_fallback\":true,\"vocab\":{},"
        "\"merges\":[]}}";
    CHECK(beside("{}") == 1);
    host.files["f/tokenizer.json"] = "{";
    CHECK(beside("{}") == -100 - static_cast<int>(Error::bad_file));
    host.files["f/tokenizer.json"] = "{\"model\":{\"type\":\"BPE\",\"byte_fallback\":true,\"vocab\":{},\"merges\":[]}}";
    host.files.erase("f/tokenizer.model");
    CHECK(beside("{}") == -100 - static_cast<int>(Error::unsupported));
}

TEST(gguf_layout, "llama.cpp would compute something else with our matrices") {
    Host host;
    Model llama, gpt2;
    if (!make_gguf(host, "llama", "none", llama) || !make_gguf(host, "gpt2", "none", gpt2)) return;
    CHECK_OK(llama.save_gguf("l.gguf"));
    CHECK_OK(gpt2.save_gguf("g.gguf"));
    const auto rows = [&](const char* name, std::initializer_list<int> order) {  // of 8 numbers
        std::string bytes;
        for (const int row : order) bytes.append(reinterpret_cast<const char*>(llama.weights + llama.find(name)->offset + 8 * row), 32);
        return host.files["l.gguf"].find(bytes) != std::string::npos;
    };
    // Each head's first half takes turns with its second half; values stay.
    CHECK(rows("model.layers.1.self_attn.q_proj.weight", {0, 2, 1, 3, 4, 6, 5, 7}));
    CHECK(rows("model.layers.1.self_attn.k_proj.weight", {0, 2, 1, 3}));
    CHECK(rows("model.layers.1.self_attn.v_proj.weight", {0, 1, 2, 3}));
    // A row for each output: a column of ours.
    const Weight& matrix = *gpt2.find("h.1.mlp.c_fc.weight");
    std::string column;
    for (int64_t i = 0; i < matrix.rows; ++i)
        column.append(reinterpret_cast<const char*>(gpt2.weights + matrix.offset + i * matrix.cols + 3), sizeof(float));
    CHECK(host.files["g.gguf"].find(column) != std::string::npos);
}

TEST(gguf_int8, "scales would be written that Q8_0 cannot hold") {
    Host host;
    Model model, loaded;
    if (!make_gguf(host, "gpt2", "none", model, 32)) return;
    float* row = model.weights + model.find("wte.weight")->offset;
    for (int i = 0; i < 32; ++i) row[i] = static_cast<float>(i) * 0x1p-27f;  // finer than f16 can say
    CHECK_OK(model.convert(Dtype::int8));
    CHECK_OK(model.save_gguf("m.gguf"));
    CHECK_OK(loaded.load(host.runtime, "m.gguf"));
    row = loaded.weights + loaded.find("wte.weight")->offset;
    for (int i = 0; i < 32; ++i) CHECK(fabs(static_cast<double>(row[i]) - i * 0x1p-27) <= 0x1p-25);
    model.weights[model.find("wte.weight")->offset] = 1e30f;
    CHECK_OK(model.convert(Dtype::int8));
    CHECK(has(model.save_gguf("m.gguf"), Error::unsupported, "too large for Q8_0"));
    CHECK(host.open_files == 0 && host.files.size() == 1);
}

TEST(gguf_claims, "a GGUF file that means another model, or none, would be taken for one that we know") {
    Host host;
    Model model;
    if (!make_gguf(host, "llama", "bpe:260", model)) return;
    CHECK_OK(model.save_gguf("m.gguf"));
    const std::string file = host.files["m.gguf"];
    const auto refused = [&](const std::string& bytes, Error error, const char* words) {
        Model loaded;
        host.start_counting();
        return CHECK(has(loaded.load_memory(host.runtime, bytes), error, words) && host.total < memory_bound(bytes.size()));
    };
    refused(replaced(file, "GGUF" + little(3, 4), "GGUF" + little(1, 4)), Error::bad_file, "version 1");
    refused(with_value(file, "general.architecture", gguf_text("llama"), gguf_text("mamba")), Error::unsupported, "mamba");
    refused(with_value(file, "llama.block_count", u32(2), u32(1)), Error::bad_file, "'blk.1.");
    refused(with_value(file, "llama.block_count", u32(2), u32(900)), Error::bad_file, "too few");
    refused(with_value(file, "llama.feed_forward_length", u32(6), u32(7)), Error::bad_file, "[7, 8]");
    refused(with_value(file, "llama.embedding_length", u32(8), f32(8.5f)), Error::bad_file, "llama.embedding_length");
    refused(with_value(file, "llama.attention.head_count", u32(2), u32(0)), Error::bad_file, "heads");
    refused(with_value(file, "llama.rope.dimension_count", u32(4), u32(2)), Error::unsupported, "rope.dimension_count is 2, but only 4");
    refused(replaced(file, "llama.attention.layer_norm_rms_epsilon", "llama.attention.layer_norm_rms_epsilom"), Error::bad_file,
            "norm_epsilon");
    refused(with_value(file, "tokenizer.ggml.pre", gguf_text("gpt-2"), gguf_text("qwen2")), Error::unsupported, "qwen2");
    refused(with_value(file, "tokenizer.ggml.model", gguf_text("gpt2"), gguf_text("rwkv")), Error::unsupported, "rwkv");
    refused(with_value(file, "general.file_type", u32(0), little(13, 4) + little(0, 4)), Error::bad_file, "unknown type 13");
    refused(with_value(file, "llama.vocab_size", u32(263), little(9, 4) + little(9, 4)), Error::bad_file, "unknown type 9");
    refused(with_value(file, "llama.vocab_size", u32(263), little(9, 4) + little(8, 4) + little(~uint64_t(0), 8)), Error::bad_file,
            "cut short");
    refused(with_value(file, "llama.vocab_size", u32(263), little(9, 4) + little(10, 4) + little(~uint64_t(0), 8)), Error::bad_file,
            "cut short");
    const std::string name = little(17, 8) + "token_embd.weight", shape = little(2, 4) + little(8, 8) + little(263, 8);
    refused(replaced(file, name + shape + little(0, 4), name + shape + little(12, 4)), Error::unsupported, "'token_embd.weight' is Q4_K");
    refused(replaced(file, name + shape + little(0, 4), name + shape + little(8, 4)), Error::bad_file, "token_embd.weight");
    refused(replaced(file, name + shape, name + little(2, 4) + little(8, 8) + little(uint64_t(1) << 62, 8)), Error::bad_file, "memory");
    refused(replaced(file, name + shape + little(0, 12), name + shape + little(0, 4) + little(32, 8)), Error::bad_file,
            "cannot begin at byte 32");
    refused(replaced(file, little(18, 8) + "output_norm.weight", little(18, 8) + "output_norn.weight"), Error::bad_file,
            "output_norm.weight");
    refused(replaced(file, "blk.1.attn_q.weight", "blk.0.attn_q.weight"), Error::bad_file, "two tensors 'blk.0.attn_q.weight'");
    refused(file + std::string(64, '\0'), Error::bad_file, "at its end");
    refused(replaced(file, gguf_text("You: "), gguf_text("You\xff ")), Error::bad_file, "UTF-8");
    Model unusual;
    Config other = foreign_config("llama");
    other.activation = Activation::relu;
    if (make_foreign(host, other, unusual)) CHECK(has(unusual.save_gguf("g.gguf"), Error::unsupported, "only silu"));
    other.norm_after = true;
    if (make_foreign(host, other, unusual)) CHECK(has(unusual.save_gguf("g.gguf"), Error::unsupported, "norms after additions"));
    CHECK(has(Model().save_gguf("g.gguf"), Error::invalid_argument, "empty") && host.files.size() == 1);
}

TEST(gguf_damage, "a damaged GGUF file could crash, hang or take all memory; too little memory or a failing disk would leak or crash") {
    for (const char* kind : {"char", "bpe:260", "wordpiece:40", "pieces"}) {
        Host host;
        Model model;
        const bool pieces = strcmp(kind, "pieces") == 0;
        if (!make_gguf(host, pieces ? "llama" : "gpt2", kind, model, pieces ? 32 : 8)) return;
        if (pieces) CHECK_OK(model.convert(Dtype::int8));
        CHECK_OK(model.save_gguf("m.gguf"));
        const std::string file = host.files["m.gguf"];
        const auto load = [&](const std::string& bytes) {
            const std::vector<char> exact(bytes.begin(), bytes.end());
            Model loaded;
            host.start_counting();
            const Status status = loaded.load_memory(host.runtime, Text(exact.data(), exact.size()));
            CHECK(status.ok() == (loaded.weights != nullptr) && (status.ok() || status.message[0]) &&
                  host.total < memory_bound(bytes.size()));
            return status.ok();
        };
        const size_t step = strcmp(kind, "char") == 0 || thoroughness() > 1 ? 1 : 7;
        for (size_t size = 0; size < file.size(); size += step)
            if (!CHECK(!load(file.substr(0, size)))) return;
        const int64_t blocks = host.blocks;
        const size_t header = file.find("output_norm.weight");
        uint64_t random = 7;
        int loaded_well = 0;
        for (int round = 0; round < 7000 * thoroughness(); ++round) {
            std::string bytes = file;
            for (uint64_t edits = 1 + next_random(random) % 3; edits > 0; --edits) {
                const size_t range = next_random(random) % 8 ? header : bytes.size(), at = next_random(random) % range % bytes.size();
                const size_t other = next_random(random) % bytes.size(), length = next_random(random) % 24;
                const uint64_t how = next_random(random) % 8;
                if (how == 0) bytes.insert(at, bytes.substr(other, length));
                else if (how == 1) bytes.erase(at, length);
                else if (how == 2) bytes.replace(at, length, bytes.substr(other, length));
                else if (how == 3) bytes[at] = static_cast<char>(bytes[at] ^ 1 << next_random(random) % 8);
                else bytes[at] = static_cast<char>(next_random(random));
                if (bytes.empty()) bytes = "GGUF";
            }
            loaded_well += load(bytes);
        }
        CHECK(loaded_well > 30 && loaded_well < 6900 * thoroughness() && host.blocks == blocks);
        if (!pieces) continue;
        for (int writes = 0; writes < 2; ++writes)
            for (int what = 0; what < 2; ++what)
                for (int64_t n = 1;; ++n) {
                    Model loaded;
                    host.start_counting();
                    (what == 0 ? host.fail_allocation : writes ? host.fail_call : host.fail_read) = n;
                    const Status status = writes ? model.save_gguf("m.gguf") : loaded.load(host.runtime, "m.gguf");
                    const bool reached = (what == 0 ? host.allocations : writes ? host.calls : host.reads) >= n;
                    if (!CHECK(status.ok() == !reached && (writes || status.ok() == (loaded.weights != nullptr)) && host.open_files == 0) ||
                        !reached)
                        break;
                }
        CHECK(host.blocks == blocks && host.files.at("m.gguf") == file);
    }
}

// ---- the resume file -------------------------------------------------------------------------------------------------

TEST(resume_is_exact, "training that was resumed would go another way than training that was never stopped") {
    Host host;
    TrainConfig config = small_training();
    config.optimizer = Optimizer::muon;  // AdamW learns the rest of the weights, so both are here
    Training whole, first, second;
    if (!whole.create(host, config) || !first.create(host, config) || !second.create(host, config, 99)) return;
    if (!whole.steps(6) || !first.steps(3)) return;
    first.trainer.best_validation_loss = 1.0 / 3, first.trainer.best_step = 2, first.trainer.bad_evaluations = 1;
    CHECK_OK(first.trainer.save("r"));
    const uint64_t version = second.model.version;
    CHECK_OK(second.trainer.load("r"));
    CHECK(second.model.version > version);
    CHECK(first.snapshot() == second.snapshot());
    CHECK_OK(second.trainer.save("r2"));
    CHECK(host.files["r"] == host.files["r2"]);
    if (!second.steps(3)) return;
    CHECK(memcmp(whole.model.weights, second.model.weights, whole.bytes()) == 0);
    CHECK(memcmp(whole.trainer.moment1, second.trainer.moment1, whole.bytes()) == 0 &&
          memcmp(whole.trainer.moment2, second.trainer.moment2, whole.bytes()) == 0);

    Model model;  // it is a model, too
    CHECK_OK(model.load(host.runtime, "r"));
    CHECK(same(model, first.model));
}

TEST(training_state, "numbers in the resume file would not be the numbers of the run") {
    Host host;
    TrainConfig config = small_training(), read;
    config.lr = 1e-3, config.min_lr = 5e-324, config.weight_decay = 1.7976931348623157e308, config.beta1 = 0, config.beta2 = 1 - 0x1p-53,
    config.epsilon = 1.1754943508222877e-38;
    config.clip = double(INFINITY), config.schedule = Schedule::wsd, config.patience = INT64_C(9007199254740993),
    config.evaluate_every = INT64_MAX;
    Training t;
    if (!t.create(host, config)) return;
    CHECK_OK(t.trainer.save("r"));
    CHECK_OK(read_train_config(host.runtime, "r", read));
    CHECK(memcmp(&read.lr, &config.lr, 8) == 0 && memcmp(&read.min_lr, &config.min_lr, 8) == 0 &&
          memcmp(&read.weight_decay, &config.weight_decay, 8) == 0);
    CHECK(memcmp(&read.beta1, &config.beta1, 8) == 0 && memcmp(&read.beta2, &config.beta2, 8) == 0 &&
          memcmp(&read.epsilon, &config.epsilon, 8) == 0);
    CHECK(memcmp(&read.clip, &config.clip, 8) == 0 && read.schedule == config.schedule && read.patience == config.patience &&
          read.seed == config.seed);
    CHECK(read.evaluate_every == config.evaluate_every && read.batch == config.batch && read.steps == config.steps);
    const std::string& file = host.files["r"];  // and Python's float.fromhex reads them
    CHECK(file.find("\\\"lr\\\":\\\"0x1.0624dd2f1a9fcp-10\\\"") != std::string::npos &&
          file.find("\\\"min_lr\\\":\\\"0x0.0000000000001p-1022\\\"") != std::string::npos);
    CHECK(file.find("\\\"beta1\\\":\\\"0x0p+0\\\"") != std::string::npos &&
          file.find("\\\"weight_decay\\\":\\\"0x1.fffffffffffffp+1023\\\"") != std::string::npos);
    for (const char* wrong : {"0x1.0624dd2f1a9fcp-1024", "0x1.0624dd2f1a9fc1p-10", "0x2p-10", "0x1.p", "0x1p-", "0x1", "1e-3", "0x0.1p+0",
                              "0x1.Ap+0", "", "0x1p+99999999999"}) {
        host.files["w"] = with_header(replaced(header_of(file), "0x1.0624dd2f1a9fcp-10", wrong), data_of(file));
        CHECK(has(read_train_config(host.runtime, "w", read), Error::bad_file, "hexadecimal number"));
    }
}

TEST(older_resume_files, "training that an earlier version of this program began could not go on") {
    Host host;
    Training t, other;
    if (!t.create(host, small_training()) || !t.steps(1)) return;
    CHECK_OK(t.trainer.save("r"));
    std::string header = header_of(host.files["r"]);
    for (const char* later : {",\\\"best_accuracy\\\":", ",\\\"evaluation_due\\\":", ",\\\"optimizer\\\":", ",\\\"muon_lr\\\":"}) {
        const size_t at = header.find(later);
        if (CHECK(at != std::string::npos)) header.erase(at, header.find_first_of(",}", at + 1) - at);
    }
    host.files["old"] = with_header(header, data_of(host.files["r"]));
    if (!other.create(host, small_training())) return;
    CHECK(other.snapshot() != t.snapshot());
    CHECK_OK(other.trainer.load("old"));
    CHECK(other.snapshot() == t.snapshot());
}

TEST(contradictions, "training would go on with other settings or other text than it began with") {
    Host host;
    Training t;
    TrainConfig config = small_training();
    config.lr = 0.001, config.min_lr = 1e-4, config.warmup = 2, config.evaluate_every = 3;
    if (!t.create(host, config) || !t.steps(1)) return;
    CHECK_OK(t.trainer.save("r"));
    const auto refused = [&](const char* words, const TrainConfig& with, int tokens = 40, const Config& shape = small_config()) {
        Training other;
        if (!other.create(host, with, 5, tokens, shape)) return;
        const std::string before = other.snapshot();
        const uint64_t version = other.model.version;
        CHECK(has(other.trainer.load("r"), Error::mismatch, words));
        CHECK(other.snapshot() == before && other.model.version == version);  // nothing half-loaded
    };
    TrainConfig c = config;
    c.lr = 0.002, refused("'r' was made with lr 0.001, but lr is 0.002", c), c = config;
    c.batch = 3, refused("batch 2, but batch is 3", c), c = config;
    c.accumulate = 2, refused("accumulate 1, but accumulate is 2", c), c = config;
    c.steps = 7, refused("steps 6, but steps is 7", c), c = config;
    c.min_lr = 0, refused("min_lr 0.0001, but min_lr is 0", c), c = config;
    c.warmup = 1, refused("warmup 2, but warmup is 1", c), c = config;
    c.optimizer = Optimizer::muon, refused("optimizer \"adamw\", but optimizer is \"muon\"", c), c = config;
    c.muon_lr = 0.01, refused("muon_lr 0.02, but muon_lr is 0.01", c), c = config;
    c.schedule = Schedule::linear, refused("schedule \"cosine\", but schedule is \"linear\"", c), c = config;
    c.weight_decay = 0, refused("weight_decay 0.1, but weight_decay is 0", c), c = config;
    c.beta1 = 0.8, refused("beta1 0.9, but beta1 is 0.8", c), c = config;
    c.beta2 = 0.999, refused("beta2 0.99, but beta2 is 0.999", c), c = config;
    c.epsilon = 1e-7, refused("epsilon 1e-08, but epsilon is 1e-07", c), c = config;
    c.clip = 0, refused("clip 1, but clip is 0", c), c = config;
    c.dropout = 0, refused("dropout 0.1, but dropout is 0", c), c = config;
    c.label_smoothing = 0.1, refused("label_smoothing 0, but label_smoothing is 0.1", c), c = config;
    c.seed = 7, refused("seed 18364758544493064720, but seed is 7", c), c = config;
    c.evaluate_every = 2, refused("evaluate_every 3, but evaluate_every is 2", c), c = config;
    c.patience = 4, refused("patience 0, but patience is 4", c), c = config;
    refused("other training data: 40 tokens", config, 41);
    {
        Training other;
        if (!other.create(host, config)) return;
        CHECK_OK(other.trainer.create(host.runtime, other.model, config, other.training));
        CHECK(has(other.trainer.load("r"), Error::mismatch, "other validation data: 17 tokens"));
    }
    Config shape = small_config();
    shape.heads = 2, refused("heads 1, but heads is 2", config, 40, shape), shape = small_config();
    shape.activation = Activation::gelu, refused("activation \"gelu_new\", but activation is \"gelu\"", config, 40, shape);
    shape = small_config(), shape.positions = Positions::rotary;
    refused("positions \"absolute\", but positions is \"rotary\"", config, 40, shape);

    Training other;
    if (!other.create(host, config)) return;
    CHECK_OK(other.model.set_chat("You: \"hey\"\n", "Bot:"));
    CHECK(has(other.trainer.load("r"), Error::mismatch, "reply_turn \"Me:?\", but reply_turn is \"Bot:\""));
    CHECK_OK(other.model.save("m"));
    CHECK(has(other.trainer.load("m"), Error::bad_file, "lacks the tensor 'moment1.wte.weight'"));
    TrainConfig read;
    CHECK(has(read_train_config(host.runtime, "m", read), Error::bad_file, "no state of training"));
}

TEST(disk_full_in_a_run, "a run whose best model could not be written once would think that it was, or could not go on") {
    std::string straight, best;
    for (int64_t n = 0;; ++n) {  // 0: nothing fails; then each writing call in turn
        Host host;
        Training t;
        TrainConfig config = small_training();
        config.evaluate_every = 2;
        if (!t.create(host, config)) return;
        RunConfig run;
        run.out = "m.safetensors";
        RunResult result;
        host.start_counting();
        host.fail_call = n;
        const Status status = t.trainer.run(run, result);
        const bool reached = n > 0 && host.calls >= n;
        CHECK(status.ok() == !reached);
        host.fail_call = 0;
        if (reached) CHECK_OK(t.trainer.run(run, result));
        CHECK(result.step == 6 && host.files.size() == 2);
        if (n == 0) straight = t.snapshot(), best = host.files["m.safetensors"];
        else if (!CHECK(t.snapshot() == straight && host.files["m.safetensors"] == best)) return;
        if (n > 0 && !reached) break;
    }
}

TEST(half_loaded, "a disk that fails in the middle of resuming would be taken for success") {
    Host host;
    Training t;
    if (!t.create(host, small_training()) || !t.steps(1)) return;
    CHECK_OK(t.trainer.save("r"));
    host.start_counting();
    CHECK_OK(t.trainer.load("r"));
    const int64_t reads = host.reads;
    for (int64_t i = 1; i <= reads; ++i) {
        host.start_counting();
        host.fail_read = i;
        const uint64_t version = t.model.version;
        const Status status = t.trainer.load("r");
        CHECK(has(status, Error::cannot_read, i <= 2 ? "'r'" : "half loaded"));
        CHECK((t.model.version != version) == (i > 2));
    }
}

TEST(damaged_resume_files, "a damaged resume file could crash or half-load a trainer") {
    Host host;
    Training t;
    if (!t.create(host, small_training()) || !t.steps(1)) return;
    CHECK_OK(t.trainer.save("r"));
    const std::string file = host.files["r"], before = t.snapshot();
    const size_t header = header_of(file).size() + 8;
    std::string& damaged = host.files["d"];
    const bool all = thoroughness() > 1;
    for (size_t size = 0; size < file.size(); size += all ? 1u : size < header ? 7u : 101u) {
        damaged = file.substr(0, size);
        if (!CHECK(!t.trainer.load("d").ok() && t.snapshot() == before)) return;
    }
    uint64_t random = 7;
    for (int round = 0; round < 3000 * thoroughness(); ++round) {
        damaged = file;
        for (uint64_t edits = 1 + next_random(random) % 3; edits > 0; --edits) {
            const size_t at = next_random(random) % header;
            damaged[at] = next_random(random) % 2 ? "0123456789{}[]\",:\\-p"[next_random(random) % 20]
                                                  : static_cast<char>(damaged[at] ^ 1 << next_random(random) % 8);
        }
        const Status status = t.trainer.load("d");
        if (!CHECK(status.ok() || t.snapshot() == before)) return;
        if (status.ok()) CHECK_OK(t.trainer.load("r"));
    }
    damaged = with_header(replaced(header_of(file), "\\\"step_count\\\":1", "\\\"step_count\\\":-1"), data_of(file));
    CHECK(has(t.trainer.load("d"), Error::bad_file, "cannot be: -1 steps"));
    damaged = with_header(replaced(header_of(file), "0x1p+8", "0x1p-200"), data_of(file));
    CHECK(has(t.trainer.load("d"), Error::bad_file, "cannot be"));
    Trainer moved = static_cast<Trainer&&>(t.trainer);
    CHECK(has(t.trainer.save("d"), Error::invalid_argument, "empty trainer") &&
          has(t.trainer.load("d"), Error::invalid_argument, "create"));
    t.trainer = static_cast<Trainer&&>(moved);
    damaged = with_header(replaced(header_of(file), "\\\"step_count\\\":1,", ""), data_of(file));
    CHECK(has(t.trainer.load("d"), Error::bad_file, "lacks 'step_count'"));
}

TEST(resume_paths, "the resume file would lie where nobody looks for it") {
    Runtime runtime;
    Array<char> path(runtime), homeless;
    CHECK_OK(resume_path("models/M.safetensors", path));
    CHECK(bytes_of(path) == "models/M.resume.safetensors");
    CHECK_OK(resume_path("M", path));
    CHECK(bytes_of(path) == "M.resume.safetensors");
    CHECK(resume_path("M", homeless).error == Error::invalid_argument);
}

// ---- comparing -------------------------------------------------------------------------------------------------------

TEST(comparing, "two models that differ would be called the same") {
    Host host;
    Config config = small_config(), untied = config, wider = config;
    untied.tied = false, wider.context = 5;
    Model a, b, c, d;
    if (!make(host.runtime, config, a) || !make(host.runtime, config, b) || !make(host.runtime, untied, c) || !make(host.runtime, wider, d))
        return;
    Array<Difference> rows;
    CHECK_OK(compare(a, b, rows));
    CHECK(rows.count == a.names.size);
    for (const Difference& row : rows) CHECK(row.same_bits && row.same_shape && row.index == -1 && row.max_difference == 0);
    const Weight* weight = b.find("h.0.mlp.c_fc.weight");
    b.weights[weight->offset + 3] += 0.5f, b.weights[weight->offset + 7] -= 2;
    b.weights[b.find("ln_f.bias")->offset] = -0.0f;
    b.weights[b.find("ln_f.weight")->offset + 1] = NAN;
    CHECK_OK(compare(a, b, rows));
    for (size_t i = 0; i < rows.count; ++i) {
        const Difference& row = rows[i];
        CHECK(strcmp(row.name, a.names[i].name) == 0);
        if (!strcmp(row.name, "h.0.mlp.c_fc.weight"))
            CHECK(!row.same_bits && row.index == 3 && fabs(row.max_difference - 2) < 1e-6 && row.max_reference > 0);
        else if (!strcmp(row.name, "ln_f.bias")) CHECK(!row.same_bits && row.index == 0 && row.max_difference == 0);
        else if (!strcmp(row.name, "ln_f.weight")) CHECK(!row.same_bits && row.index == 1 && row.max_difference > 1e300);
        else CHECK(row.same_bits);
    }
    CHECK_OK(compare(a, c, rows));  // c has a head of its own
    CHECK(rows.count == c.names.size && strcmp(rows[rows.count - 1].name, "lm_head.weight") == 0 && !rows[rows.count - 1].same_shape);
    CHECK_OK(compare(c, a, rows));
    CHECK(rows.count == c.names.size);
    int missing = 0;
    for (const Difference& row : rows) missing += !row.same_shape;
    CHECK(missing == 1);
    CHECK_OK(compare(a, d, rows));
    for (const Difference& row : rows) CHECK(row.same_shape == (strcmp(row.name, "wpe.weight") != 0));
    CHECK(!compare(a, Model(), rows).ok());
}

}  // namespace

int main(int argc, char** argv) { return run_tests(argc, argv); }
