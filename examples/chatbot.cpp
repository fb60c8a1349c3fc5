// g++ -std=c++17 -O2 -pthread examples/chatbot.cpp -o build/chatbot && build/chatbot build/village.safetensors "Borin: "
// Talks with a model that was trained on dialogues (`make run` makes one). The second argument chooses who answers.
#define BABYGPT_IMPLEMENTATION
#include <stdio.h>
#include <string.h>

#include "../babygpt.h"

using namespace babygpt;

// Called with whole UTF-8 characters as they come. Returning false would stop the reply.
static bool print(void*, Text piece) {
    fwrite(piece.data, 1, piece.size, stdout);
    fflush(stdout);
    return true;
}

int main(int count, char** arguments) {
    if (count < 2) {
        fprintf(stderr, "usage: %s MODEL.safetensors [REPLY_TURN]\n", arguments[0]);
        return 2;
    }
    Runtime runtime;
    Model model;
    Session session;  // remembers the conversation; many sessions can share one model
    Status s = model.load(runtime, arguments[1], Purpose::running);
    if (s.ok()) s = session.create(runtime, model);
    if (s.ok() && model.chat.empty()) {
        fprintf(stderr, "error: '%s' was not trained with --user-turn and --reply-turn\n", arguments[1]);
        return 1;
    }
    SampleConfig sampling;
    sampling.temperature = 0.5;
    char line[1000];
    while (s.ok() && printf("> ") && fflush(stdout) == 0 && fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = '\0';
        Generation reply;
        reply.stream = print;
        s = session.reply(line, sampling, reply, count > 2 ? arguments[2] : "");
        if (reply.unknown) printf("  (the model has never seen %d of those characters)", static_cast<int>(reply.unknown));
        printf("\n");
    }
    if (!s.ok()) fprintf(stderr, "error: %s\n", s.message);
    return s.ok() ? 0 : 1;
}
