"""Generates stories and questions about them from a grammar and a seed.

The checkpoint in `assets/tiny_world` was pretrained on the stories, and the demo fine-tunes it to
answer the questions. In a story, a few characters walk about, find things, give them away and count
them. Its last sentences state the final situation. The generator tracks the state of the world, so
that it knows the answer to every question. The stories never contain questions about themselves, so
that answering is new to the model.

    python examples/tiny_world.py stories --rows=100000 --out=out/tiny_world/stories.jsonl
    python examples/tiny_world.py questions --rows=4000 --out=out/tiny_world/train.jsonl
    python examples/tiny_world.py tokenizer --rows=20000 --out=out/tiny_world/tokenizer

A row only depends on the seed and its index: row 7 is the same in a file of ten rows and in one of
a million.
"""

import dataclasses
import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from peft_jax.runtime import exits
from peft_jax.runtime.flags import Arguments

NAMES = (
    "Anna Ben Cora Dan Ella Finn Gus Hugo Ivy Jack Kim Lily Max Mia Nora Otto Paul Rosa Ruby Sam "
    "Theo Tom Wren Zoe"
).split()
ANIMALS = "bear cat crow deer dog duck fox frog goat hare mouse owl".split()
SURNAMES = [animal.capitalize() for animal in ANIMALS]
TEMPERS = "brave clever gentle hungry lazy merry old quiet shy small tall young".split()
FEELINGS = "calm glad happy proud sad surprised tired worried".split()
COLOURS = "black blue brown green pink red white yellow".split()
THINGS = "ball bell book box cup drum flute hat kite lamp map ring rope scarf".split()
COUNTED = "acorns apples beans buttons coins feathers leaves nuts pears plums shells stones".split()
NUMBERS = "two three four five six seven eight nine".split()
PLACES = {
    "barn": "in the barn",
    "beach": "on the beach",
    "bridge": "on the bridge",
    "forest": "in the forest",
    "garden": "in the garden",
    "hill": "on the hill",
    "kitchen": "in the kitchen",
    "lake": "by the lake",
    "market": "at the market",
    "mill": "at the mill",
    "river": "by the river",
    "school": "at the school",
}
OPENINGS = (
    "It was a warm morning.",
    "It was a cold evening.",
    "The sun was shining.",
    "It had rained all night.",
    "There was snow on the ground.",
    "It was a quiet day.",
    "The wind was strong.",
    "It was the first day of spring.",
)
VOCABULARY = 768
"""Vocabulary size of the tokenizer: bytes, words of the stories and special tokens."""
SMALLEST_VOCABULARY = 256 + 5
"""Minimum vocabulary size: bytes, three special tokens and two roles."""

SONGS = 0.25
"""Share of songs in the pretraining text."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}\n"
    "{% elif message['role'] == 'assistant' %}<|assistant|>"
    "{% generation %} {{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('roles are user and assistant') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclasses.dataclass(kw_only=True)
class Character:
    """One character and its state."""

    name: str
    animal: str
    place: str
    thing: str | None = None
    counted: str | None = None
    number: int = 0
    feeling: str | None = None

    @property
    def title(self) -> str:
        """Name with the animal: "Mia Fox"."""
        return f"{self.name} {self.animal.capitalize()}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fact:
    """Something true at the end of a story.

    Attributes:
      subject: Kind of fact: "where", "who", "what", "colour", "animal", "count", "more" or
        "feeling".
      question: Question that asks for the fact.
      answer: Sentence that states the fact.
    """

    subject: str
    question: str
    answer: str


class Story:
    """A story built sentence by sentence, with the state of its world.

    Args:
      rng: Random generator of every choice.

    Attributes:
      sentences: Sentences of the story.
      characters: One or two characters.
      colours: Color of each mentioned thing.
    """

    def __init__(self, rng: random.Random):
        self._rng = rng
        self.sentences: list[str] = []
        self.colours: dict[str, str] = {}
        count = rng.choice((1, 2))
        self.characters = [
            Character(name=name, animal=animal, place=place)
            for name, animal, place in zip(
                rng.sample(NAMES, count),
                rng.sample(ANIMALS, count),
                rng.choices(sorted(PLACES), k=count),
                strict=True,
            )
        ]
        self._tell()

    def facts(self) -> list[Fact]:
        """Returns every fact at the end of the story that a question can ask for."""
        found = []
        for one in self.characters:
            found.append(
                Fact(
                    subject="where",
                    question=f"Where was {one.name} in the end?",
                    answer=f"{one.name} was {PLACES[one.place]}.",
                )
            )
            found.append(
                Fact(
                    subject="animal",
                    question=f"What animal was {one.name}?",
                    answer=f"{one.name} was {_article(one.animal)}.",
                )
            )
            if one.thing is not None:
                colour = self.colours[one.thing]
                found.append(
                    Fact(
                        subject="who",
                        question=f"Who had the {one.thing} in the end?",
                        answer=f"{one.name} had the {one.thing}.",
                    )
                )
                found.append(
                    Fact(
                        subject="what",
                        question=f"What did {one.name} have in the end?",
                        answer=f"{one.name} had the {one.thing}.",
                    )
                )
                found.append(
                    Fact(
                        subject="colour",
                        question=f"What colour was the {one.thing}?",
                        answer=f"The {one.thing} was {colour}.",
                    )
                )
            if one.counted is not None:
                found.append(
                    Fact(
                        subject="count",
                        question=f"How many {one.counted} did {one.name} have?",
                        answer=f"{one.name} had {NUMBERS[one.number]} {one.counted}.",
                    )
                )
            if one.feeling is not None:
                found.append(
                    Fact(
                        subject="feeling",
                        question=f"How did {one.name} feel?",
                        answer=f"{one.name} felt {one.feeling}.",
                    )
                )
        owners = [one for one in self.characters if one.counted is not None]
        if len(owners) == 2 and owners[0].number != owners[1].number:
            less, more = sorted(owners, key=lambda one: one.number)
            found.append(
                Fact(
                    subject="more",
                    question=f"Who had more {more.counted}?",
                    answer=f"{more.name} had more {more.counted} than {less.name}.",
                )
            )
        return found

    def _tell(self) -> None:
        """Tells the opening, the characters and some events."""
        rng = self._rng
        self._say(rng.choice(OPENINGS))
        for one in self.characters:
            temper = _article(f"{rng.choice(TEMPERS)} {one.animal}")
            where = PLACES[one.place]
            self._say(
                rng.choice(
                    (
                        f"{one.title} lived {where}.",
                        f"{one.name} was {temper} who lived {where}.",
                        f"{where[0].upper()}{where[1:]} there was {temper} called {one.name}.",
                    )
                )
            )
        if rng.random() < 0.5:
            self._count()
        events = [self._find] * 4 + [self._go] * 3 + [self._feel] * 2 + [self._stay] * 3
        if len(self.characters) > 1:
            events += [self._meet] * 3 + [self._ask]
        for event in rng.choices(events, k=rng.randint(2, 3) + len(self.characters)):
            event()

    def _say(self, sentence: str) -> None:
        self.sentences.append(sentence)

    def _call(self, one: Character) -> str:
        """Returns the name, or the name with the animal."""
        return one.title if self._rng.random() < 0.5 else one.name

    def _described(self, one: Character) -> str:
        """Returns a character's thing with its color: "red kite"."""
        return f"{self.colours[one.thing or '']} {one.thing}"

    def _find(self) -> None:
        """A character without a thing finds one; where all have one, something else happens."""
        rng = self._rng
        empty = [one for one in self.characters if one.thing is None]
        if not empty:
            return self._give() if len(self.characters) > 1 else self._stay()
        one = rng.choice(empty)
        thing = rng.choice([thing for thing in THINGS if thing not in self.colours])
        self.colours[thing] = rng.choice(COLOURS)
        one.thing = thing
        described = _article(f"{self.colours[thing]} {thing}")
        return self._say(
            rng.choice(
                (
                    f"{self._call(one)} found {described}.",
                    f"{self._call(one)} saw {described} and took it.",
                    f"Under a tree {self._call(one)} found {described}.",
                )
            )
        )

    def _give(self) -> None:
        """One character gives its thing to another, who has none afterwards but that one."""
        rng = self._rng
        giver, taker = rng.sample(self.characters, 2)
        if giver.thing is None:
            giver, taker = taker, giver
        if giver.thing is None:
            return self._find()
        if taker.thing is not None:
            giver.thing, taker.thing = taker.thing, giver.thing
            return self._say(
                f"{self._call(giver)} gave the {self._described(taker)} to {self._call(taker)} "
                f"and got the {self._described(giver)}."
            )
        giver.thing, taker.thing = None, giver.thing
        return self._say(
            f"{self._call(giver)} gave the {self._described(taker)} to {self._call(taker)}."
        )

    def _go(self) -> None:
        """A character walks to another place."""
        one = self._rng.choice(self.characters)
        one.place = self._rng.choice([place for place in sorted(PLACES) if place != one.place])
        verb = self._rng.choice(("went to", "walked to", "ran to"))
        self._say(f"{self._call(one)} {verb} the {one.place}.")

    def _meet(self) -> None:
        """A character comes to another, and perhaps gives it something."""
        one, other = self._rng.sample(self.characters, 2)
        if one.place != other.place:
            one.place = other.place
            self._say(f"{self._call(one)} went to the {one.place} to meet {self._call(other)}.")
        self._give()

    def _count(self) -> None:
        """Every character gathers some of the same kind of thing."""
        rng = self._rng
        counted = rng.choice(COUNTED)
        for one in self.characters:
            one.counted, one.number = counted, rng.randrange(len(NUMBERS))
            verb = rng.choice(("picked up", "gathered", "counted"))
            self._say(f"{self._call(one)} {verb} {NUMBERS[one.number]} {counted}.")

    def _feel(self) -> None:
        """A character feels something."""
        one = self._rng.choice(self.characters)
        one.feeling = self._rng.choice(FEELINGS)
        self._say(f"{self._call(one)} was {one.feeling}.")

    def _stay(self) -> None:
        """A moment at which nothing changes, and how matters stand is said."""
        one = self._rng.choice(self.characters)
        if one.thing is not None and self._rng.random() < 0.6:
            verb = self._rng.choice(("still had", "liked", "looked at"))
            self._say(f"{self._call(one)} {verb} the {self._described(one)}.")
        else:
            self._say(f"{self._call(one)} was still {PLACES[one.place]}.")

    def _ask(self) -> None:
        """A character speaks; nothing changes."""
        one, other = self._rng.sample(self.characters, 2)
        self._say(
            self._rng.choice(
                (
                    f'"Who are you?" asked {one.name}. "I am {other.name}," said {other.name}.',
                    f'"How are you?" asked {one.name}. "I am well," said {other.name}.',
                    f'"What a fine day!" said {one.name}.',
                    f'"Where shall we go?" asked {one.name}. {other.name} did not know.',
                    f'"How many stars are there?" asked {one.name}. "Too many," said {other.name}.',
                    f'"What colour is the sky?" asked {one.name}. "Look up," said {other.name}.',
                )
            )
        )


def _article(phrase: str) -> str:
    """Returns a phrase with its indefinite article: "an owl"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def story_text(rng: random.Random) -> str:
    """Returns a complete story, which ends with the final situation."""
    story = Story(rng)
    facts = story.facts()
    ending = rng.sample(facts, min(len(facts), rng.randint(4, 7)))
    return " ".join([*story.sentences, "In the end:", *dict.fromkeys(f.answer for f in ending)])


def song_text(rng: random.Random) -> str:
    """A song that names the same few again and again, in a new order each time.

    Only what was said before tells which animal goes with a name, and which thing with a colour:
    from songs a model learns to look back, long before stories alone would teach it.
    """
    pairs = [
        (first, rng.choice(seconds))
        for firsts, seconds in ((NAMES, SURNAMES), (COLOURS, THINGS), (NUMBERS, COUNTED))
        for first in firsts
    ]
    phrases = [" ".join(pair) for pair in rng.sample(pairs, rng.randint(3, 6))]
    verses = [", ".join(rng.sample(phrases, len(phrases))) for _ in range(rng.randint(3, 5))]
    return f"Sing of {'; '.join(verses)}."


def any_text(rng: random.Random) -> str:
    """Returns a row of pretraining text: a story or a song."""
    return song_text(rng) if rng.random() < SONGS else story_text(rng)


def question_row(rng: random.Random) -> dict[str, object]:
    """Returns a story without its ending, a question and its answer, as chat messages."""
    story = Story(rng)
    facts = story.facts()
    subject = rng.choice(sorted({fact.subject for fact in facts}))
    fact = rng.choice([fact for fact in facts if fact.subject == subject])
    return {
        "subject": subject,
        "messages": [
            {"role": "user", "content": f"{' '.join(story.sentences)}\n{fact.question}"},
            {"role": "assistant", "content": fact.answer},
        ],
    }


def rows(kind: Callable[[random.Random], object], *, count: int, seed: str) -> Iterator[object]:
    """Yields `count` rows of a kind; each only depends on the seed and its index."""
    return (kind(random.Random(f"{seed}/{index}")) for index in range(count))


def train_tokenizer(
    texts: Iterable[str], *, vocabulary: int = VOCABULARY
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer for the stories, with a chat template.

    Args:
      texts: what it is trained on.
      vocabulary: how many tokens it has, the special ones and the 256 bytes among them.
    """
    special = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    roles = ["<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[*special.values(), *roles],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        **special,
    )


@exits.command("examples.tiny_world")
def main() -> None:
    """Writes stories, questions or a tokenizer."""
    parser = Arguments("examples.tiny_world", description=__doc__)
    parser.add_argument("what", choices=("stories", "questions", "tokenizer"))
    parser.add_argument("--out", type=Path, required=True, help="output file (tokenizer: folder)")
    parser.add_argument("--rows", type=int, default=1000, help="number of stories or questions")
    parser.add_argument("--seed", default="train", help="seed of the rows; any text")
    parser.add_argument(
        "--vocabulary", type=int, default=VOCABULARY, help="vocabulary size of the tokenizer"
    )
    given = parser.parse_args()
    if given.rows < 1:
        raise ValueError(f"--rows is {given.rows}, but must be at least 1")
    if given.what == "tokenizer" and given.vocabulary < SMALLEST_VOCABULARY:
        raise ValueError(
            f"--vocabulary is {given.vocabulary}, but must be at least {SMALLEST_VOCABULARY}, for"
            " 256 bytes and the special tokens"
        )
    if given.what == "tokenizer" and given.out.is_file():
        raise ValueError(f"--out is the file {given.out}, but a tokenizer needs a folder")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    if given.what == "tokenizer":
        texts = map(str, rows(any_text, count=given.rows, seed=given.seed))
        train_tokenizer(texts, vocabulary=given.vocabulary).save_pretrained(given.out)
        return
    with given.out.open("w", encoding="utf-8") as file:
        if given.what == "stories":
            for text in rows(any_text, count=given.rows, seed=given.seed):
                file.write(json.dumps({"text": text}) + "\n")
        else:
            for row in rows(question_row, count=given.rows, seed=given.seed):
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
