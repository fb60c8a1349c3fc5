// g++ -std=c++17 -O2 -pthread examples/game.cpp -o build/game && build/game build/village.safetensors
// A game loop of 60 frames a second in which a villager speaks: the game asks for one token a frame, so that no frame waits for a sentence.
// Everything is allocated before the loop; a token allocates nothing and, with threads = 1, starts no thread.
#define BABYGPT_IMPLEMENTATION
#include <stdio.h>

#include <chrono>
#include <thread>

#include "../babygpt.h"

using namespace babygpt;
using Clock = std::chrono::steady_clock;

int main(int count, char** arguments) {
    const char* path = count > 1 ? arguments[1] : "build/village.safetensors";
    Runtime runtime;
    runtime.threads = 1;
    Model model;
    Session villager;
    Status s = model.load(runtime, path, Purpose::running);  // its matrices once, as sessions read them
    if (s.ok()) s = villager.create(runtime, model);
    Array<int32_t> prompt(runtime);
    // The player walks up to the smith. The space after the name belongs to the first word of the answer.
    const Tokenizer& words = model.tokenizer;
    const int32_t first = words.begin_of_text >= 0 ? words.begin_of_text : words.end_of_text;
    if (s.ok() && first >= 0 && !prompt.push(first)) return fprintf(stderr, "error: %s\n", error_text(Error::out_of_memory)), 1;
    if (s.ok()) s = model.tokenizer.encode("You: Hello! Can you make me a sword?\nBorin:", prompt);
    if (s.ok()) s = villager.feed(prompt);
    SampleConfig sampling;
    sampling.temperature = 0.5;
    Utf8Stream utf8;
    double worst = 0;
    int frames = 0;
    for (bool speaking = true; s.ok() && speaking && frames < 600; ++frames) {
        const Clock::time_point frame = Clock::now();
        // ... the game's own work: input, physics, drawing ...
        int32_t id = 0;
        s = villager.next(sampling, id);
        const double spent = std::chrono::duration<double, std::milli>(Clock::now() - frame).count();
        worst = spent > worst ? spent : worst;
        const Text piece = model.tokenizer.bytes(id);
        speaking = id != model.tokenizer.end_of_text && !(piece.size > 0 && piece[piece.size - 1] == '\n');
        char whole[512];  // whole characters only: a speech bubble never shows half of one
        if (speaking && piece.size < sizeof whole - 3) {
            const size_t n = utf8.push(piece, whole);
            fwrite(whole, 1, n, stdout);
            fflush(stdout);
        }
        std::this_thread::sleep_until(frame + std::chrono::microseconds(16667));
    }
    if (!s.ok()) fprintf(stderr, "error: %s\n", s.message);
    else printf("\n(%d frames; the slowest token took %.2f ms of a frame's 16.67)\n", frames, worst);
    return s.ok() ? 0 : 1;
}
