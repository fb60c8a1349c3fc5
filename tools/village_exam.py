#!/usr/bin/env python3
# Asks a trained village model the questions of examples/village_questions.jsonl.
#
#   python3 tools/village_exam.py build/babygpt build/village.safetensors
#   python3 tools/village_exam.py PROGRAM MODEL [more options for "chat"]
#
# Every question is asked three times, each time in a new conversation: as it
# is written, in capitals, and in lower case without punctuation. None of the
# questions stands in examples/village.txt word for word. An answer passes if it
# contains at least one of the words "any" and each of the words "all". The last
# line of the file is a talk of six turns, held in one conversation.
#
# The misses are printed, then the score of each form, then one last line
# "N passed, N failed". The exit status is 0 if each form reaches 75 % and at
# least 5 turns of the talk fit, 1 if not, 2 if the exam could not be held.

import json
import os
import re
import subprocess
import sys

NEEDED = 0.75
NEEDED_TURNS = 5
TIME_LIMIT = 900  # seconds for one villager
EXAMPLES = os.path.join(os.path.dirname(os.path.abspath(__file__)),
                        "..", "examples")
QUESTIONS = os.path.join(EXAMPLES, "village_questions.jsonl")
TEXT = os.path.join(EXAMPLES, "village.txt")


def stop(message):
    print("village_exam: " + message, file=sys.stderr)
    sys.exit(2)


def capitals(text, lang):
    if lang == "tr":
        text = text.replace("i", "İ").replace("ı", "I")
    return text.upper()


def lower(text, lang):
    if lang == "tr":
        text = text.replace("I", "ı").replace("İ", "i")
    return text.lower()


def plain(text, lang):
    text = re.sub(r"[^\w\s]", "", lower(text, lang).replace("-", " "))
    return " ".join(text.split())


FORMS = [("as written", lambda text, lang: text),
         ("capitals", capitals),
         ("no punctuation", plain)]


def contains(reply, word, lang):
    """Is the word in the reply? Turkish words may carry any ending."""
    end = "" if lang == "tr" else r"(?:s|es)?(?!\w)"
    return re.search(r"(?<!\w)" + re.escape(lower(word, lang)) + end,
                     lower(reply, lang)) is not None


def fits(reply, question):
    lang = question.get("lang", "en")
    return (any(contains(reply, w, lang) for w in question["any"])
            and all(contains(reply, w, lang) for w in question.get("all", [])))


def read_questions(path):
    """Returns the single questions and the talks."""
    single, talks = [], []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
                (talks if "talk" in item else single).append(item)
                item["who"]
            except (ValueError, KeyError) as error:
                stop("%s, line %d: %s" % (path, number, error))
    return single, talks


def bare(text):
    """The words alone, with every kind of i made the same."""
    for letter in "Iİı":
        text = text.replace(letter, "i")
    return " " + plain(text, "en") + " "


def check_new(single, talks):
    """Stops if a question stands word for word in the training text."""
    with open(TEXT, encoding="utf-8") as f:
        known = "\n".join(bare(line[4:]) for line in f
                          if line.startswith("You:"))
    for question in single + [turn for t in talks for turn in t["talk"]]:
        if bare(question["ask"]) in known:
            stop("this question is in the text: " + question["ask"])


def chat(program, model, options, who, lines):
    """Sends the lines to one process; returns its replies, one per turn."""
    turns = sum(line != "/reset" for line in lines)
    command = [program, "chat", model, "--reply-turn", who + ": ",
               "--temperature", "0", "--json"] + options
    try:
        done = subprocess.run(command, input="\n".join(lines) + "\n",
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              encoding="utf-8", errors="replace",
                              timeout=TIME_LIMIT)
    except OSError as error:
        stop("cannot start %s: %s" % (program, error))
    except subprocess.TimeoutExpired:
        stop("no end after %d seconds: %s" % (TIME_LIMIT, " ".join(command)))
    replies = []
    for line in done.stdout.splitlines():
        if not line.strip():
            continue
        try:
            replies.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError):
            stop("not a reply: " + line)
    if done.returncode != 0 or len(replies) != turns:
        stop("%d replies to %d turns, exit status %d: %s\n%s"
             % (len(replies), turns, done.returncode, " ".join(command),
                done.stderr.strip()))
    return replies


def main():
    if len(sys.argv) < 3:
        stop("usage: village_exam.py PROGRAM MODEL [more options for chat]")
    program, model, options = sys.argv[1], sys.argv[2], sys.argv[3:]
    single, talks = read_questions(QUESTIONS)
    check_new(single, talks)
    passed = {name: 0 for name, _ in FORMS}
    failed = {name: 0 for name, _ in FORMS}
    talk_ok = True
    talk_passed = talk_failed = 0

    # One process per villager asks all of this villager's questions.
    villagers = []
    for item in single + talks:
        if item["who"] not in villagers:
            villagers.append(item["who"])
    for who in villagers:
        lines, asked, held = [], [], []
        for question in single:
            if question["who"] == who:
                for name, change in FORMS:
                    ask = change(question["ask"], question.get("lang", "en"))
                    lines += ["/reset", ask]
                    asked.append((name, ask, question))
        for talk in talks:
            if talk["who"] == who:
                lines += ["/reset"] + [turn["ask"] for turn in talk["talk"]]
                held.append(talk)
        replies = iter(chat(program, model, options, who, lines))
        for name, ask, question in asked:
            reply = next(replies)
            if fits(reply, question):
                passed[name] += 1
            else:
                failed[name] += 1
                print("miss (%s)\n  You: %s\n  %s: %s\n  expected: %s"
                      % (name, ask, who, reply.strip(),
                         " or ".join(question["any"])
                         + "".join(" and " + w
                                   for w in question.get("all", []))))
        for talk in held:
            fitting = 0
            print("talk with " + who)
            for turn in talk["talk"]:
                reply = next(replies)
                good = fits(reply, turn)
                fitting += good
                print("  You: %s\n  %s: %s%s" % (turn["ask"], who,
                                                 reply.strip(),
                                                 "" if good else "   <- miss"))
            talk_passed += fitting
            talk_failed += len(talk["talk"]) - fitting
            if fitting < NEEDED_TURNS:
                talk_ok = False

    good = talk_ok
    for name, _ in FORMS:
        total = passed[name] + failed[name]
        score = passed[name] / total if total else 0.0
        print("%-15s %3d of %3d  (%.1f %%)" % (name + ":", passed[name], total,
                                               100.0 * score))
        if score < NEEDED:
            good = False
    print("%-15s %3d of %3d turns" % ("talk:", talk_passed,
                                      talk_passed + talk_failed))
    print("%d passed, %d failed" % (sum(passed.values()) + talk_passed,
                                    sum(failed.values()) + talk_failed))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
