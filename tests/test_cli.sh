#!/bin/sh
# The command line's contract, end to end, on a model of a thousand weights: exit codes, messages, the shapes of --json,
# refusals, resuming after every kind of end, round trips. Run from the repository's root: BABYGPT=build/babygpt sh tests/test_cli.sh
babygpt=${BABYGPT:-build/babygpt}
case "$babygpt" in /*) ;; *) babygpt=$PWD/$babygpt ;; esac
text=$PWD/examples/village.txt
folder=$(mktemp -d) || exit 1
trap 'rm -rf "$folder"' EXIT
cd "$folder" || exit 1
passed=0 failed=0
tiny='--layers 1 --heads 1 --width 8 --context 8 --batch 2 --threads 1'

good() { passed=$((passed + 1)); }
bad() { failed=$((failed + 1)); echo "FAILED: $*"; sed 's/^/    /' out err 2> /dev/null | head -n 8; }
# run STATUS COMMAND...: runs babygpt, keeps its output in out and err, and says whether it ended with this status
run() {
    wanted=$1; shift
    "$babygpt" "$@" > out 2> err < "${input:-/dev/null}"
    status=$?
    if [ $status -eq "$wanted" ]; then good; else bad "babygpt $* ended with $status, not with $wanted"; fi
}
# Errors are one line that begins in one way and names what is wrong.
says() {
    if [ "$(wc -l < err)" -eq 1 ] && grep -q '^babygpt: error: ' err && grep -q -e "$1" err; then good
    else bad "the error should be one line about $1"; fi
}
has() { if grep -q -e "$2" "$1"; then good; else bad "$1 should hold $2"; fi; }
check() { what=$1; shift; if "$@"; then good; else bad "$what"; fi; }
same() { what=$1; if cmp -s "$2" "$3"; then good; else bad "$what"; fi; }
# Every line is one JSON object (looked at closely where Python is there, roughly where not).
json() {
    if command -v python3 > /dev/null; then
        if python3 -c 'import json, sys; [json.loads(l).items() for l in sys.stdin]' < out; then good; else bad "not JSON"; fi
    elif grep -q -v '^{.*}$' out; then bad "not JSON"; else good; fi
}
# wait_for FILE: until it is there and not empty, ten seconds at most
wait_for() {
    tries=0
    until [ -s "$1" ] || [ $tries -ge 100 ]; do sleep 0.1; tries=$((tries + 1)); done
    [ -s "$1" ]
}
last_step() { tail -n 1 "$1" | cut -d, -f1; }

head -c 4000 "$text" > a.txt
head -c 9000 "$text" | tail -c 5000 > b.txt

# ---- usage ----
run 0 --version;                            has out '^babygpt [0-9]'
run 0 --help;                               has out '  train '
run 0 help chat;                            has out '--reply-turn'
run 0 train --help;                         has out '--accumulate'
run 2;                                      says help
run 2 trian;                                says 'did you mean train'
run 2 train a.txt --out x --stesp 3;        says 'did you mean --steps'
run 2 train a.txt --out x --steps many;     says "--steps 'many'"
run 2 train a.txt --out x --steps 0;        says "--steps '0'"
run 2 train a.txt --out x --batch 2000000;  says 'from 1 to 1000000'
run 2 train a.txt --out x --lr nan;         says "--lr 'nan'"
run 2 train a.txt --out x --schedule wild;  says "--schedule 'wild': must be one of cosine"
run 2 train a.txt --out x --steps;          says '--steps needs a value'
run 2 train a.txt;                          says '--out'
run 2 train a.txt --out x --preset huge;    says 'huge'
run 2 train a.txt --out x --steps 3 --epochs 2; says 'only one of'
run 2 train a.txt --out a.txt --steps 3;    says 'a.txt is a file to read from'
run 2 train a.txt --out x --plot ./b.txt --tokenizer b.txt --steps 3; says '--plot b.txt is a file to read from'
run 2 train a.txt --out x.safetensors --log ./x.safetensors --steps 3; says '--out and --log name the same file'
run 2 train a.txt --out x.safetensors --log ../${PWD##*/}/x.resume.safetensors --steps 3; says "resume file and --log name the same file"
run 2 train a.txt --out x --plain-words --steps 3; says '--plain-words belongs to --user-turn'
run 2 train a.txt --out x --classes --plain-words --steps 3; says '--plain-words does not belong to --classes'
run 2 train a.txt --out x --classes --answers-only --steps 3; says '--answers-only does not belong to --classes'
run 1 train none.txt --out x --steps 3;     says 'none.txt'
run 1 train a.txt --out no/where --steps 3; says 'no/where'
run 1 generate none.safetensors --prompt a; says 'none.safetensors'
run 1 train a.txt --out x --log b.txt --steps 3; says 'b.txt'
cp b.txt kept; run 1 train a.txt --out x --token-cache b.txt --steps 3; says 'b.txt.*keeps no tokens'; same 'no cache, not written over' b.txt kept
run 1 train a.txt --out x --log /dev/null --steps 3; says 'no ordinary file'
run 1 train a.txt --out /dev/null --overwrite --steps 3; says 'no ordinary file'
run 2 train a.txt --out x --lr 0 --steps 3; says 'lr is 0'
run 2 train a.txt --out x --precision tf32 --steps 3; says 'precision tf32 needs --backend cuda'
run 2 eval none --precision bf16 a.txt;     says 'precision bf16 is for training on a processor'
run 2 bench decode --precision bf16;        says 'precision bf16 is of training'
run 2 tokenizer a.txt --vocab 300 --out my-vocab.json; says 'vocab.json'
for name in t.txt t.bin t.gguf; do run 2 tokenizer a.txt --vocab 300 --out $name; says "does not end in .${name#t.}"; done
run 1 info --preset gpt2-xl --batch 1000000 --context 65536; says 'batch is 1000000'
run 1 train a.txt --out x --plot no/p.svg --steps 3; says 'no/p.svg'
check 'a refused training leaves no file' test ! -e x -a ! -e x.resume.lock -a ! -e x.resume.safetensors.lock

# ---- tokens ----
printf 'h\303\251!\n\200\377' > odd.bin
input=odd.bin run 0 encode byte
check 'bytes are their own ids' test "$(cat out)" = '104 195 169 33 10 128 255'
cp out ids; input=ids run 0 decode byte
same 'decode gives the exact bytes' out odd.bin
run 0 tokenizer a.txt b.txt --vocab 300 --out t.json --json; json
input=b.txt run 0 encode t.json; cp out ids
input=ids run 0 decode t.json;              same 'BPE: decode of encode is the text' out b.txt
input=odd.bin run 0 encode t.json; cp out ids
input=ids run 0 decode t.json;              same 'BPE: decode of encode is the bytes' out odd.bin
run 2 tokenizer a.txt --vocab 256 --out u.json;      says '257'
run 2 tokenizer a.txt --vocab 300 --cased --out u.json; says '--kind wordpiece'
run 2 tokenizer a.txt --vocab 300 --kind words --out u.json; says 'must be one of bpe|wordpiece'
run 1 tokenizer a.txt --kind wordpiece --vocab 6 --out u.json; says 'vocabulary of 6 is too small.*need'
run 0 tokenizer a.txt --kind wordpiece --vocab 90 --out w.json
run 2 tokenizer a.txt --kind bpe --vocab 300 --out u.model; says '--kind unigram'
run 2 tokenizer a.txt --kind bpe --vocab 300 --byte-fallback --out u.json; says '--kind unigram'
run 1 tokenizer a.txt --kind unigram --vocab 6 --out u.model; says 'vocabulary of 6 is too small.*need'
run 0 tokenizer a.txt b.txt --kind unigram --vocab 90 --out u.model
run 0 tokenizer a.txt b.txt --kind unigram --vocab 90 --out u.json
input=b.txt run 0 encode u.model; cp out ids
input=b.txt run 0 encode u.json;            same 'unigram: both files give the same ids' out ids
input=ids run 0 decode u.json;              same 'unigram: decode of encode is the text' out b.txt
run 1 tokenizer a.txt --kind unigram --vocab 340 --byte-fallback --out u.model; says 'u.model exists'
run 0 tokenizer a.txt --kind unigram --vocab 340 --byte-fallback --out u.model --overwrite
input=odd.bin run 0 encode u.model; cp out ids
printf 'h\303\251!\n\357\277\275\357\277\275' > replaced
input=ids run 0 decode u.model;             same 'byte fallback: what is no UTF-8 is U+FFFD, the rest comes back' out replaced
printf '{"other":[{"a":"}"}],"text":"h\\u00e9\\ud83d\\ude00"}\n{"hex":"ff0a"}\n' > lines
input=lines run 0 encode byte --jsonl;      has out '^{"ids":\[104,195,169,240,159,152,128\]}$'; has out '^{"ids":\[255,10\]}$'
cp out lines; input=lines run 0 decode byte --jsonl; json; has out '"hex":"ff0a"'
printf '{"ids":[240,159,97,195]}\n' > lines
input=lines run 0 decode byte --jsonl
check 'text as errors=replace gives it' test "$(cat out)" = "$(printf '{"hex":"f09f61c3","text":"\357\277\275a\357\277\275"}')"
printf '{"ids":[1]}\n{"ids":[300]}\n' > lines; input=lines run 1 decode byte --jsonl; says 'line 2.*300'
printf '{"text":"a"}\000junk\n' > lines; input=lines run 1 encode byte --jsonl; says 'line 1'
printf 'step,loss\n1e17,2\n' > huge.csv; run 1 plot huge.csv; says 'huge.csv, line 2'
printf '\357\273\277step,loss\n1,0.001\n2,0.1\n3,1e30\n' > marked.csv; run 0 plot marked.csv
check 'no tick is less than 0 by nothing' test "$(grep -c ' 0.00' out) $(grep -c -e '-0.0' out)" = '1 0'
"$babygpt" encode byte < a.txt >&- 2> err; check 'a closed standard output is an error' test $? -eq 1; says 'standard output'
printf '{"text":"a"}\n{"text":3}\n' > lines; input=lines run 1 encode byte --jsonl; says 'line 2'

# ---- training ----
run 0 train a.txt --out m.safetensors $tiny --steps 40 --evaluate-every 20 --json --log m.csv --plot m.svg; json
has out '^{"step":1,"loss":[0-9.]*,"lr":[-0-9.e]*,"grad_norm":[0-9.]*,"tokens_per_second":[0-9.e+]*}$'
has out '^{"step":20,.*"validation_loss":'
check 'a line a step and a last one' test "$(wc -l < out)" -eq 41
tail -n 1 out > last; has last '^{"done":true,'; has last '"best_validation_loss":[0-9]'; has last '"best_step":'; has last '"ngram_loss":[0-9]'
check 'nothing on standard error beside --json' test ! -s err
has m.svg '</svg>'
check 'a log row a step' test "$(wc -l < m.csv)" -eq 41
run 0 plot m.csv --svg p.svg;               has p.svg validation
run 0 plot m.csv;                           has out step
run 2 plot m.csv --svg ./m.csv;             says 'm.csv is a file to read from'
odd=$(printf 'a\377b.csv')
if cp m.csv "$odd" 2> /dev/null; then  # not every system has such names
    run 0 plot m.csv "$odd" --svg p.svg;    has p.svg '>a\\xffb, training<'
fi
run 0 train a.txt --out nan.safetensors $tiny --steps 20 --lr 10 --weight-decay 100 --clip 0 --json --log nan.csv --plot nan.svg
json; has out '"sample":""'; has nan.csv 'e+17,.*nan'; has nan.svg '</svg>'  # it diverges
check 'the lock is gone' test ! -e m.resume.safetensors.lock
run 1 train a.txt --out m.safetensors $tiny --steps 40; says '--overwrite'
run 1 train a.txt --out n.safetensors --resume;  says n.resume.safetensors
run 1 train a.txt --out m.safetensors --resume --steps 50;    says '--steps 50 contradicts.*40'
run 1 train a.txt --out m.safetensors --resume --width 16;    says '--width 16 contradicts.*8'
run 1 train a.txt --out m.safetensors --resume --optimizer muon;  says '--optimizer "muon" contradicts.*adamw'
run 1 train a.txt --out m.safetensors --resume --positions rotary; says '--positions "rotary" contradicts.*learned'
run 1 train a.txt --out m.safetensors --resume --plain-words; says '--plain-words true contradicts.*false'
run 1 train a.txt --out m.safetensors --resume --validation-fraction 0.3; says 'training data.*--validation-fraction'
run 1 train a.txt --out m.safetensors --resume --tokenizer byte; says '--tokenizer byte contradicts.*char'
run 1 train b.txt --out m.safetensors --resume; says data
# What bf16 rounds is little, but something; and the same with any number of threads.
run 0 train a.txt --out f32.safetensors $tiny --steps 4
run 0 train a.txt --out bf16.safetensors $tiny --steps 4 --precision bf16
run 0 train a.txt --out bf16-3.safetensors $tiny --steps 4 --precision bf16 --threads 3
run 0 compare bf16.safetensors bf16-3.safetensors
run 1 compare f32.safetensors bf16.safetensors
run 0 train a.txt --out wp.safetensors $tiny --tokenizer wordpiece:90 --steps 4
run 0 train a.txt --out wp.safetensors --resume --tokenizer wordpiece:90
run 1 train a.txt --out wp.safetensors --resume --tokenizer wordpiece:80; says '--tokenizer wordpiece:80 contradicts'
run 1 train a.txt --out x.safetensors $tiny --tokenizer wordpiece:6; says 'too small'
run 0 train a.txt --out up.safetensors $tiny --tokenizer unigram:80 --steps 4
run 0 train a.txt --out up.safetensors --resume --tokenizer unigram:80
run 1 train a.txt --out up.safetensors --resume --tokenizer unigram:70; says '--tokenizer unigram:70 contradicts'
input=a.txt run 0 train - --out s.safetensors $tiny --steps 40 --evaluate-every 20
run 0 compare s.safetensors m.safetensors;  has out 'same bits'
run 1 train - --out q.safetensors $tiny --steps 5; says 'standard input'
run 0 train a.txt --out d.safetensors --preset nano --time 0.5 --no-counting; has err '--steps [0-9]* --evaluate-every [0-9]*'
repeat=$(sed -n 's/.*give \(--steps .*\)/\1/p' err)
run 0 train a.txt --out e.safetensors --preset nano $repeat --no-counting
run 0 compare d.safetensors e.safetensors;  has out 'same bits'

run 0 train a.txt --validation b.txt --out v.safetensors $tiny --steps 20 --json
loss=$(tail -n 1 out | sed 's/.*"best_validation_loss":\([0-9.]*\).*/\1/')
run 0 eval v.safetensors b.txt --json;      has out "\"loss\":$loss,"

# ---- stopping and going on ----
long="$tiny --steps 1000000 --save-every 10 --seed 7"
run 0 train a.txt --out i.safetensors $long --stop-at 30 --log i.csv --json; has out '^{"done":false,"step":30,'
run 0 train a.txt --out r.safetensors $long --stop-at 11 --log r.csv
run 0 train a.txt --out r.safetensors --resume --stop-at 30 --threads 2 --log r.csv
run 0 compare i.resume.safetensors r.resume.safetensors
same 'resuming is exact' i.resume.safetensors r.resume.safetensors
cut -d, -f1-4 i.csv > i.rows; cut -d, -f1-4 r.csv > r.rows
same 'the log goes on' i.rows r.rows
run 1 compare m.safetensors i.safetensors
for signal in INT TERM KILL; do
    "$babygpt" train a.txt --out k$signal.safetensors $long --log k.csv > kout 2> kerr &
    process=$!
    check 'it saves while it trains' wait_for k$signal.resume.safetensors
    if [ $signal = INT ]; then
        run 1 train a.txt --out kINT.safetensors $long --overwrite; says 'another process'
    fi
    kill -$signal $process
    wait $process 2> /dev/null
    status=$?
    case $signal in
        KILL) check 'a kill is a kill' test $status -eq 137 ;;
        *) check "SIG$signal: saved, status 130 (not $status)" test $status -eq 130 ;;
    esac
    until=$(($(last_step k.csv) + 15))
    run 0 train a.txt --out k$signal.safetensors --resume --stop-at $until --log k.csv
    check 'the log has no step twice' test -z "$(cut -d, -f1 k.csv | sort | uniq -d)"
    check 'the log has the steps' test "$(wc -l < k.csv)" -ge $until  # a header, and all but at most the one that a kill cut off
    run 0 train a.txt --out u.safetensors $long --stop-at $until --overwrite
    same "going on after SIG$signal is exact" u.resume.safetensors k$signal.resume.safetensors
done

# ---- talking and looking ----
run 0 train a.txt --out c.safetensors $tiny --steps 20 --user-turn 'You: ' --reply-turn 'Mira: ' --json
run 0 generate m.safetensors --prompt 'You' --tokens 12 --json; json; has out '^{"text":".*","ids":\[[0-9,]*\],.*"tokens_per_second":'
cp out first; run 0 generate m.safetensors --prompt 'You' --tokens 12 --json --threads 2
sed 's/"tokens_per_second.*//' first > first.text; sed 's/"tokens_per_second.*//' out > second.text
same 'the same seed, the same text' first.text second.text
run 0 generate m.safetensors --prompt 'You' --tokens 12 --temperature 0 --stop e
run 0 generate m.safetensors --prompt 'You' --tokens 12 --beams 4 --best 3 --json; json
has out '^{"best":\[{"text":".*","ids":\[[0-9,]*\],"score":-[0-9.e-]*,"logprob":-[0-9.e-]*,"ended":false},{.*},{.*}\],"seconds":'
run 0 generate m.safetensors --prompt 'You' --tokens 12 --beams 4 --best 3; check 'three texts' test "$(wc -l < out)" -eq 3
run 0 generate m.safetensors --prompt 'You' --tokens 4 --beams 1; cp out one; run 0 generate m.safetensors --prompt 'You' --tokens 4 --temperature 0
same 'one beam is greedy' one out
run 0 generate m.safetensors --prompt 'You' --tokens 60 --temperature 3 --min-p 0 --ban-pattern '[A-M]*' --json
check 'no letter from A to M' test -z "$(sed 's/.*"text":"\([^"]*\)","ids.*/\1/; s/\\[nurtbf]//g' out | grep -i '[a-m]')"
run 2 generate m.safetensors --ban-pattern '[a';            says "ban-pattern: pattern 0, '\[a', lacks a \]"
run 2 generate m.safetensors --beams 4 --temperature 0.5;   says 'temperature'
run 2 generate m.safetensors --beams 4 --best 5;            says 'best 5'
run 2 generate m.safetensors --length-penalty 2;            says 'belongs to --beams'
run 2 generate m.safetensors --beams 4 --tokens 0;          says 'tokens 0'
printf 'Hello\n/reset\nWho are you?\n\n' > talk
input=talk run 0 chat c.safetensors --tokens 10;         check 'a line in, a line out' test "$(wc -l < out)" -eq 3
input=talk run 0 chat c.safetensors --tokens 10 --json --reply-turn 'Bram: '; json; check 'an object a line' test "$(grep -c '^{"text":' out)" -eq 3
input=talk run 0 chat m.safetensors --tokens 10;         has err 'no chat template'
run 0 train a.txt --out typo.safetensors $tiny --steps 2 --user-turn 'You: ' --reply-turn 'Mirra: '
has err "no line of the text begins with 'Mirra: '"; check 'but with the other turn' test "$(grep -c 'no line' err)" -eq 1
run 0 eval m.safetensors b.txt --train a.txt --json; json; has out '^{"loss":[0-9.]*,"bits_per_byte":[0-9.]*,"perplexity":'; has out '"ngram_loss":'
run 0 eval m.safetensors b.txt;             has out '^loss'
input=b.txt run 0 score m.safetensors;      has out '^sum of'
mkdir tokens; cp u.model tokens/tokenizer.model; run 0 train a.txt --out begins.safetensors $tiny --tokenizer tokens --steps 2
input=b.txt run 0 score begins.safetensors; check 'what begins a text gives the first token a probability' test "$(grep -c ' - ' out)" -eq 0
printf '{"text":"You: hello"}\n' > lines
input=lines run 0 score m.safetensors --jsonl; json; has out '^{"ids":\[.*\],"logprobs":\[.*\],"sum":-[0-9.]*}$'
# ---- pairs: a model that translates ----
printf 'one cat\tbir kedi\ntwo dogs\tiki kopek\nthe sea\tdeniz\na very long line that is left out\tx\nthe dog\tkopek\n' > p.tsv
translator="--arch transformer --layers 1 --heads 2 --width 16 --context 16 --batch 2 --threads 1 --tokenizer bpe:280 --validation p.tsv"
run 0 train p.tsv --out p.safetensors $translator --steps 40 --schedule inverse_sqrt --label-smoothing 0.1 --stop-at 20
has err '4 training and 4 validation pairs (2 others are longer than --context 16, and are left out)'; has out 'babygpt translate p.safetensors'
run 1 train p.tsv --out p.safetensors --resume;                    has err 'other validation data'
run 1 train p.tsv --out p.safetensors --resume --validation p.tsv --arch gpt2;   says '--arch gpt2 contradicts.*sinusoidal positions, relu'
run 1 train p.tsv --out p.safetensors --resume --validation p.tsv --encoder-layers 2; says '--encoder-layers 2 contradicts'
run 0 train p.tsv --out p.safetensors --resume $translator
run 0 train p.tsv --out q.safetensors $translator --steps 40 --schedule inverse_sqrt --label-smoothing 0.1
run 0 compare p.resume.safetensors q.resume.safetensors
printf 'one cat\n\nthe sea\n' > lines
run 0 attention p.safetensors 'the sea' --json; json; has out '"source":\['  # of a translator: at the source
input=lines run 0 translate p.safetensors; check 'a line in, a line out' test "$(wc -l < out)" -eq 3; cp out piped
run 0 translate p.safetensors lines;                               same 'a file as standard input' out piped
run 0 translate p.safetensors lines --json; json;                  has out '^{"source":"the sea","text":".*","score":-[0-9.]*,"logprob":-[0-9.]*,"tokens":[0-9]*,"ended":'
run 0 translate p.safetensors lines --beams 3 --length-penalty 0.6; check 'beams: a line in, a line out' test "$(wc -l < out)" -eq 3
run 0 generate p.safetensors --source 'one cat' --beams 2 --best 2; check 'two translations' test "$(wc -l < out)" -eq 2
printf 'a\n%040d\n' 7 > lines; input=lines run 1 translate p.safetensors; says 'standard input, line 2: the source has'
run 1 translate p.safetensors .;                                   says 'cannot read .: '
run 0 generate p.safetensors --source 'one cat' --temperature 0
run 1 generate p.safetensors;                                      says 'no source yet'
run 2 generate m.safetensors --source x;                           says 'no encoder'
run 1 translate m.safetensors lines;                               says 'no encoder'
run 0 eval p.safetensors p.tsv --json; json;                       has out '"left_out":1'
run 0 info p.safetensors;                                          has out 'gpt2, 1 encoder and 1 layers.*relu, layer norm after, sinusoidal'; has out 'encoder.h.0.attn.c_attn'
run 2 train p.tsv --out none --encoder-layers 1 --tokenizer char;     says '--tokenizer.*end-of-text'
run 1 train p.tsv --out none --encoder-layers 1 --context 2 --steps 2; says 'all .* pairs are longer than context, 2'
run 1 train a.txt --out none --encoder-layers 1 --steps 2;            says 'a.txt.*, line 1: there is no tab'
run 2 train p.tsv --out none --encoder-layers 1 --token-cache c --steps 2; says '--token-cache is not for'
# ---- fine-tuning ----
run 0 train b.txt --from c.safetensors --out f.safetensors --batch 2 --steps 12 --threads 1 --answers-only --json; json; cp f.resume.safetensors whole
run 0 info f.safetensors;                   has out 'You: '
run 0 train b.txt --from c.safetensors --out f.safetensors --overwrite --batch 2 --steps 12 --answers-only --stop-at 5
run 1 train b.txt --out f.safetensors --resume;  says 'training data.*--answers-only'
run 0 train b.txt --out f.safetensors --resume --answers-only
same 'resuming on answers is exact' f.resume.safetensors whole
run 1 train b.txt --from c.safetensors --out g.safetensors --width 16; says '--width 16 contradicts.*8'
run 1 train b.txt --from c.safetensors --out g.safetensors --tokenizer byte; says '--tokenizer byte contradicts.*char'
run 2 train b.txt --from c.safetensors --out c.safetensors --overwrite; says 'c.safetensors is a file to read from'
run 1 train b.txt --from c.safetensors --out f.safetensors --resume; says 'is no adapter.*only the training of an adapter'
run 0 eval f.safetensors b.txt --answers-only --json; json
run 2 eval m.safetensors b.txt --answers-only;   says 'm.safetensors has no chat template'
run 0 train b.txt --from c.safetensors --out l.safetensors --lora 2 --batch 2 --steps 12 --threads 1 --json; json; cp l.resume.safetensors whole
run 0 train b.txt --from c.safetensors --out l.safetensors --overwrite --lora 2 --batch 2 --steps 12 --stop-at 5; has err "an adapter's, of rank 2, beside"
run 0 train b.txt --from c.safetensors --out l.safetensors --resume; has out 'chat c.safetensors --adapter l.safetensors'
same 'resuming an adapter is exact' l.resume.safetensors whole
run 1 train b.txt --out l.safetensors --resume;  says 'is an adapter.*say --from MODEL again'
run 1 train b.txt --from f.safetensors --out l.safetensors --resume; says 'beside a model with other weights'
run 2 train b.txt --from m.safetensors --out g.safetensors --lora 2 --user-turn 'You: ' --reply-turn 'Mira: '; says 'an adapter holds no chat template'
run 0 eval c.safetensors b.txt --adapter l.safetensors --json; json; sed 's/,.*//' out > beside
run 0 convert c.safetensors --merge l.safetensors --out merged.safetensors
run 0 eval merged.safetensors b.txt --json; sed 's/,.*//' out > merged
check 'merged is what stood beside' test "$(cut -c1-14 merged)" = "$(cut -c1-14 beside)"
input=talk run 0 chat c.safetensors --adapter l.safetensors --tokens 10; check 'a line in, a line out' test "$(wc -l < out)" -eq 3
input=b.txt run 0 score c.safetensors --adapter l.safetensors; has out '^sum of'
run 1 generate c.safetensors --adapter m.safetensors; says 'm.safetensors. is no adapter'
run 1 generate l.safetensors;                    says 'l.safetensors. is an adapter'
run 2 train b.txt --out g.safetensors --lora 2;  says '--lora needs --from'
run 2 train b.txt --from c.safetensors --out g.safetensors --lora-alpha 2; says '--lora-alpha belongs to --lora'
run 2 train b.txt --from c.safetensors --out g.safetensors --lora 2 --lora-targets q_proj; says "called 'q_proj'"
run 2 train b.txt --from c.safetensors --out g.safetensors --lora 2 --optimizer muon --steps 3; says 'by adamw'
rm -f l.safetensors l.resume.safetensors
run 2 train b.txt --out g.safetensors --answers-only; says '--answers-only needs --reply-turn'
run 1 train b.txt --out g.safetensors --answers-only --user-turn 'You: ' --reply-turn 'Nobody: '; says "begins with 'Nobody: '"

# ---- encoders and classifiers ----
small='--layers 1 --heads 2 --width 16 --batch 4 --threads 1'
i=0
while [ $i -lt 30 ]; do printf 'the soup is good %d\tfor\nthe soup is bad %d\tagainst\n' $i $i; i=$((i + 1)); done > c.tsv
printf 'no label here\n' > wrong.tsv
printf 'a soup\tneither\n' > other.tsv
run 0 train c.tsv --classes --out class.safetensors --steps 60 --evaluate-every 20 $small --lr 1e-2 --json; json
has out '"sample":"100.00 % right"'
run 0 eval class.safetensors c.tsv;              has out 'accuracy  *100.00 %'
run 0 eval class.safetensors c.tsv --json;       json; has out '"top1":1,'; has out '"tokens":60,'
printf 'the soup is bad\nthe soup is good\n' > lines
input=lines run 0 classify class.safetensors;    check 'labels' [ "$(cut -f1 out | tr '\n' ' ')" = 'against for ' ]
input=lines run 0 classify class.safetensors --json; json; has out '"label":"against","probability":0.*"probabilities":{"against":0.*"for":'
input=lines run 0 embed class.safetensors;       json; check 'a vector of each line' [ "$(wc -l < out)" -eq 2 ]
check 'width numbers' [ "$(head -n 1 out | tr ',' '\n' | wc -l)" -eq 16 ]
run 0 info class.safetensors;                    has out 'a classifier of 2 classes: against for'
run 1 fill class.safetensors 'the [MASK]';       says 'is a classifier'
run 1 generate class.safetensors;                says 'only a decoder'
run 1 eval class.safetensors other.tsv;          says "'neither' is none of the model's classes"
run 1 train wrong.tsv --classes --out none.safetensors --steps 2 $small; says 'wrong.tsv, line 1: expected a text, a tab and a label'
run 2 train c.tsv --classes --encoder-only --out none.safetensors;       says 'exclude each other'
run 0 train c.tsv --classes --out class1.safetensors --steps 20 --evaluate-every 10 $small --stop-at 7
run 1 train c.tsv --out class1.safetensors --resume;                      says 'classes left out contradicts'
run 0 train c.tsv --classes --out class1.safetensors --resume --threads 2
run 0 train c.tsv --classes --out class2.safetensors --steps 20 --evaluate-every 10 $small
run 0 compare class1.safetensors class2.safetensors
run 0 train a.txt --encoder-only --out gaps.safetensors --steps 20 --evaluate-every 10 $small --context 16 --json; json; has out '"sample":".*\[.*\]'
run 0 train a.txt --encoder-only --out gaps1.safetensors --steps 20 --evaluate-every 10 $small --context 16 --stop-at 7
run 0 train a.txt --encoder-only --out gaps1.safetensors --resume --threads 3
run 0 compare gaps.safetensors gaps1.safetensors
run 0 fill gaps.safetensors 'th[MASK] [MASK]ou' --top 3; check 'two gaps' [ "$(grep -c '^gap' out)" -eq 2 ]; check 'three each' [ "$(grep -c '%$' out)" -eq 6 ]
run 0 fill gaps.safetensors 'th[MASK]' --json;  json; has out '"gap":1,"tokens":\[{"id":'
run 1 fill gaps.safetensors 'the';              says 'no .MASK.'
run 0 eval gaps.safetensors b.txt;              has out 'nats a hidden token'
run 2 eval gaps.safetensors b.txt --train a.txt; says 'counting'
run 0 convert gaps.safetensors --dtype int8 --out gaps8.safetensors
run 0 fill gaps8.safetensors 'th[MASK]';        has out '%$'
run 1 classify gaps.safetensors;                says 'has no classes'
run 0 train c.tsv --classes --from gaps.safetensors --out tuned.safetensors --steps 5 --batch 4
run 0 info tuned.safetensors --json;             json; has out '"context":16,'; has out '"width":16,'; has out '"classes":2,'
run 1 train c.tsv --classes --from gaps.safetensors --width 8 --out none.safetensors;       says 'width 8 contradicts'
run 2 train c.tsv --classes --from gaps.safetensors --tokenizer byte --out none.safetensors; says 'from has one'
run 1 train c.tsv --classes --from p.safetensors --out none.safetensors;                 says 'translates'
run 0 train c.tsv --classes --from m.safetensors --out decoder.safetensors --steps 2 --batch 4; has out 'babygpt classify'
printf '\357\273\277a\t9\nb\t1a\nc\t10\na\t1a\nb\t9\n' > marked.tsv
run 0 train marked.tsv --classes --tokenizer char --out order.safetensors --steps 2 $small; has err ': 5 training and 0 validation tokens'
run 0 info order.safetensors; has out '3 classes: 9 10 1a'

# ---- numbers of fewer bits ----
run 0 convert m.safetensors --dtype int8 --out m8.safetensors;  has out 'm8.safetensors: .* kB in int8 (.* kB before)'
run 1 convert m.safetensors --dtype bf16 --out m8.safetensors;  says 'm8.safetensors exists.*--overwrite'
run 0 convert m8.safetensors --dtype int8 --out again.safetensors --json; json; has out '"dtype":"int8"'
same 'int8 again is the same' m8.safetensors again.safetensors
run 2 convert m.safetensors;                                      says 'convert needs OUT'
run 0 convert m.safetensors hf/;                                  has out 'Hugging Face folder from a babygpt checkpoint; gpt2'
run 0 convert hf back.safetensors --json; json;                   has out '"read":"Hugging Face folder"'
run 0 compare m.safetensors back.safetensors
run 1 convert m.safetensors m.bin;                                says 'only Llama'
run 0 train a.txt --out lecture.safetensors --arch lecture --layers 1 --heads 2 --width 8 --context 8 --batch 2 --threads 1 --steps 3 --stop-at 2
run 1 train a.txt --out lecture.safetensors --resume --arch transformer; says '--arch transformer contradicts.*a bias in the head'
run 0 train a.txt --out lecture.safetensors --resume --arch lecture;     run 0 generate lecture.safetensors --prompt a --tokens 3
run 0 convert m.safetensors m.gguf;                               has out 'GGUF file from a babygpt checkpoint; gpt2.*with its tokenizer'
run 0 convert m.gguf g.safetensors --json; json;                  has out '"read":"GGUF file"'
run 0 compare m.safetensors g.safetensors;                        has out 'the same bits'
run 0 train a.txt --out l.safetensors --arch llama --kv-heads 1 --layers 2 --heads 2 --width 8 --context 8 --batch 2 --threads 1 --steps 3
run 0 info l.safetensors;                                         has out 'llama, 2 layers, 2 heads (1 of keys and values).*swiglu, rms norm'
run 0 info l.safetensors;                                         has out 'model.layers.1.self_attn.qkv'
run 1 train a.txt --out l.safetensors --resume --arch gpt2;       says '--arch gpt2 contradicts.*llama'
run 2 train a.txt --out x --heads 4 --kv-heads 3 --width 8 --steps 3; says 'multiple of kv_heads, 3'
run 0 convert l.safetensors l.bin;                                has out 'llama2.c file from a babygpt checkpoint; llama'
run 0 convert l.bin l2.safetensors
run 1 encode l2.safetensors;                                      says 'l2.safetensors has no tokenizer'
run 0 compare l.safetensors l2.safetensors
run 0 convert l2.safetensors lhf;                                 has lhf/config.json '"model_type":"llama"'
run 0 convert lhf l3.safetensors
run 0 compare l.safetensors l3.safetensors
run 0 convert l.bin l4.safetensors --tokenizer l.safetensors;         has out 'with its tokenizer'
run 0 eval l.safetensors b.txt --json; json; cp out wanted; run 0 eval l4.safetensors b.txt --json; same 'the tokenizer is another' out wanted
run 1 convert l.bin l5.safetensors --tokenizer t.json;                says 't.json has 300 tokens.*another tokenizer'
run 1 convert l.bin lhf;                                          says 'lhf exists.*--overwrite'
run 2 convert m.safetensors --dtype int4 --out x.safetensors;   says 'f32.*bf16.*int8'
run 2 convert m.safetensors --out x.safetensors;                says '--dtype'
run 0 info m8.safetensors --json; json;     has out '"dtype":"int8"'
run 1 compare m.safetensors m8.safetensors; has out 'by at most'
for backend in plain cpu; do run 0 generate m8.safetensors --prompt a --tokens 30 --seed 3 --backend $backend; cp out $backend.out; done
same 'int8 is the same in both backends' plain.out cpu.out
run 0 bench decode --preset nano --dtype int8 --seconds 0.05 --json; json; has out '"dtype":"int8"'

# ---- counting in the place of a model ----
run 0 eval ngram:3 b.txt --train a.txt --json; json
has out '^{"loss":[0-9.]*,"bits_per_byte":[0-9.]*,"perplexity":[0-9.]*,"tokens":[0-9]*,"top1":[0-9.]*,"top5":[0-9.]*,"unknown":[0-9]*}$'
run 0 eval ngram:2 --train a.txt --tokenizer byte; has out '^loss'
best=$(sed -n 's/.*"ngram_loss":\([0-9.]*\).*/\1/p' last); order=$(sed -n 's/.*"ngram_order":\([0-9]*\).*/\1/p' last)
run 0 eval ngram:$order --train a.txt --json; has out "^{\"loss\":$best,"  # train, too, had left out the last tenth
run 0 generate ngram:3 --train a.txt --prompt 'You: ' --tokens 40 --json; json; has out '^{"text":".*","ids":\[[0-9,]*\],"logprobs":\[[-0-9.,e]*\],"tokens_per_second":'
run 0 generate ngram:8 --train a.txt --tokenizer bpe:300 --prompt 'You: i' --tokens 60 --temperature 0; cp out greedy
run 0 generate ngram:8 --train a.txt --tokenizer bpe:300 --prompt 'You: i' --tokens 60 --top-k 1 --threads 1; same 'counting is greedy, too' out greedy
run 2 eval ngram:9 b.txt --train a.txt;     says "'ngram:9': must be ngram:1 to ngram:8"
run 0 generate ngram:3 --train a.txt --tokenizer tokens --tokens 5; check 'no blank before a document' test "$(cut -c1 out)" != ' '
run 2 eval ngram:2 b.txt;                   says 'needs --train FILE'
run 2 eval m.safetensors;                   says 'eval needs M FILE'
run 2 eval m.safetensors b.txt --tokenizer char; says 'belongs to ngram:N'
run 2 generate ngram:2 --train a.txt --stop x; says '--stop does not go with ngram:2'
run 2 generate m.safetensors --train a.txt; says '--train belongs to ngram:N'

run 0 nearest m.safetensors You - e + o --json --count 3; json; has out '^{"ids":\[[0-9,]*\],"neighbours":\[{"token":".*","id":[0-9]*,"cosine":[-0-9.e]*},'
run 0 nearest l.safetensors Y;              check 'ten neighbours' test "$(wc -l < out)" -eq 10
run 1 nearest m.safetensors a - a;          says 'cancel out'
run 1 nearest m.safetensors 'a%%';          says "'a%%'.*never seen"
run 2 nearest m.safetensors a b;            says 'with + or - between'
run 2 nearest m.safetensors a +;            says 'with + or - between'

# ---- measuring texts ----
printf 'the cat sat down here\n' > said; printf 'the cat sat up here now\r\n' > wanted; printf '0\n1\n1\n' > labels; printf '1\n1\n0\n' > guesses
run 0 measure bleu said wanted;             has out '^BLEU  *34.98$'  # 100 exp(1 - 6/5) (4/5 2/4 1/3 1/4) ^ (1/4), of 5, 4, 3 and 2 n-grams
run 0 measure bleu said wanted said --json; json; has out '^{"bleu":100,"precisions":\[100,100,100,100\],'
{ printf '\357\273\277'; cat said; } > marked; run 0 measure bleu marked said --json; has out '^{"bleu":100,'
run 0 measure distinct said wanted --json; json; has out '^{"distinct_1":0.636363636,"distinct_2":0.777777778,"repetition":0,"words":11}$'
run 0 measure accuracy guesses labels --json; json; has out '^{"accuracy":0.333333333,"f1_macro":0.25,"f1":0.5,"positive":"1",'
run 0 measure accuracy guesses labels --positive 0; has out '^F1 *0.0000 of 0'
head -c 3000 a.txt | tail -c 120 > copy; printf 'qqqq' >> copy
run 0 measure copied copy b.txt a.txt --json; json; has out '^{"longest":120,.*"document":2,"span":50,"spans":75,"copied_spans":71,'
head -c 2000 a.txt > half
run 0 measure copied a.txt half;            has out '^copied  *49.78 % of the spans of 50 characters (1,951 of 3,919)'
printf '{"reply":"a horse"}\n{"reply":"a house\\n"}\n' > said.jsonl
run 0 measure copied said.jsonl said.jsonl --field reply --span 7 --json; json; has out '"longest":8,"text":"a house\\n","document":2,.*"spans":3,"copied_spans":3'
run 2 measure;                              says 'measure needs bleu'
run 2 measure blue said wanted;             says 'must be bleu, distinct, accuracy or copied'
run 2 measure bleu said;                    says 'bleu needs HYPOTHESES REFERENCES'
run 1 measure bleu said a.txt;              says 'a.txt has .* lines, but said 1'
run 1 measure accuracy none.txt labels;     says 'none.txt'
run 2 measure accuracy guesses labels --positive 2; says "--positive '2'"
run 2 measure distinct said --span 3;       says '--span belongs to measure copied'
run 1 measure distinct /dev/null;           says 'no words'

run 0 info m.safetensors --json; json;      has out '"parameters":[0-9]'
run 0 info --preset baby --batch 8;         has out 'multiply-adds'
run 0 attention m.safetensors 'You see' --svg at.svg; has at.svg '</svg>'
run 1 attention m.safetensors 'You see me here';      says context
run 2 attention m.safetensors You --layer 5;          says '--layer 5'
run 0 bench decode --preset nano --seconds 0.05 --json; json; has out '"percent_of_ceiling":'
run 0 bench train --preset nano --batch 1 --seconds 0.05;  has out 'GFLOP/s'
run 0 bench prefill --preset nano --context 40 --width 64 --seconds 0.05 --json; json; has out '"context":40,"width":64'
run 2 bench prefill --preset nano --width 65;         says "--width '65'.*multiple of"
run 0 bench decode --model m8.safetensors --seconds 0.05 --json; json; has out '"model":"m8.safetensors".*"dtype":"int8"'
run 2 bench decode --model m.safetensors --vocab 9;   says '--vocab belongs to a preset'
run 0 bench idle --preset nano --seconds 0.05 --json; json; has out '"percent_of_a_core":[0-9]'
run 2 bench sleep;                                    says 'must be train, prefill, decode or idle'
run 0 selftest;                                       has out ' 0 failed'

# ---- standard output that cannot take it ----
if [ -w /dev/full ]; then
    for command in 'encode byte' 'generate m.safetensors --prompt You' 'info m.safetensors' '--version'; do
        "$babygpt" $command < a.txt > /dev/full 2> err
        check "a full disk is an error: $command" test $? -eq 1; says 'standard output'
    done
fi
for i in 1 2 3 4 5 6 7 8; do cat "$text"; done > big.txt
{ "$babygpt" encode byte < big.txt 2> err; echo $? > status; } | head -c 10 > /dev/null
check 'a closed pipe is an error' test "$(cat status)" = 1; says 'standard output'
{ "$babygpt" train a.txt --out w.safetensors $long --json 2> err; echo $? > status; } | head -n 1 > /dev/null
check 'a closed pipe ends the training' test "$(cat status)" = 1; says 'standard output'
check 'and saves it' test -s w.resume.safetensors

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
