"""A corpus of our own to try everything with: generated English-Chinese pairs, no download needed.

The pairs are written by the templates below, small enough to learn in minutes and regular enough that a model which has
learnt them translates combinations that it has never seen. They are the same on every machine and every Python. They
are not real data: whatever is prepared from them is marked `synthetic`.

Every sentence is unique on both sides, and whatever English must express (tense, number, definiteness) is visible in
the Chinese, so that there is one right translation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

PAIRS = 6000
ATTRIBUTION = "Relay sample corpus (generated, not real data)"


@dataclass(frozen=True)
class Person:
    """A subject; `person` is 1, 2 or 3, `plural` as the English verb sees it."""

    zh: str
    en: str
    object_en: str
    person: int = 3
    plural: bool = False

    @property
    def third(self) -> bool:
        return self.person == 3 and not self.plural

    @property
    def be(self) -> str:
        if self.third:
            return "is"
        return "am" if self.person == 1 and not self.plural else "are"

    @property
    def was(self) -> str:
        return "were" if self.plural or self.person == 2 else "was"

    @property
    def pronoun(self) -> tuple[str, str]:
        """How a second clause takes this subject up again, Chinese and English."""
        if self.person != 3 or self.plural:
            return self.zh, self.en
        return ("她", "she") if self.en in _WOMEN else ("他", "he")


@dataclass(frozen=True)
class Thing:
    """A noun with its measure word; `unit` is English for what the measure word counts ("cup of", "")."""

    zh: str
    measure: str
    en: str
    unit: str = ""
    plural: str = ""

    def counted(self, number: int) -> tuple[str, str]:
        """Chinese and English for `number` of it, 1 to 5."""
        head, rest = (self.unit, f" of {self.en}") if self.unit else (self.en, "")
        if number == 1:
            english = f"{_article(head)} {head}{rest}"
        else:
            english = f"{_NUMBERS[number][1]} {self.units if self.unit else self.many}{rest}"
        return f"{_NUMBERS[number][0]}{self.measure}{self.zh}", english

    @property
    def units(self) -> str:
        """The plural of the unit."""
        return f"{self.unit}es" if self.unit.endswith("s") else f"{self.unit}s"

    @property
    def many(self) -> str:
        """The plural, or the bare noun where it is not countable ("tea")."""
        return self.en if self.unit else self.plural or f"{self.en}s"


@dataclass(frozen=True)
class Verb:
    """A verb in the forms that English needs."""

    zh: str
    base: str
    third: str
    past: str
    gerund: str
    things: tuple[str, ...]
    places: tuple[str, ...] = ()

    def present(self, subject: Person) -> str:
        return self.third if subject.third else self.base


_WOMEN = {"she", "Mary", "my mother", "my younger sister"}
_NUMBERS = {1: ("一", "one"), 2: ("两", "two"), 3: ("三", "three"), 4: ("四", "four"), 5: ("五", "five")}

ME = Person("我", "I", "me", 1)
PEOPLE = (
    ME,
    Person("你", "you", "you", 2),
    Person("他", "he", "him"),
    Person("她", "she", "her"),
    Person("我们", "we", "us", 1, True),
    Person("他们", "they", "them", 3, True),
    Person("汤姆", "Tom", "Tom"),
    Person("玛丽", "Mary", "Mary"),
    Person("我妈妈", "my mother", "my mother"),
    Person("我爸爸", "my father", "my father"),
    Person("我妹妹", "my younger sister", "my younger sister"),
    Person("我弟弟", "my younger brother", "my younger brother"),
    Person("我朋友", "my friend", "my friend"),
    Person("那位老师", "that teacher", "that teacher"),
    Person("那位医生", "that doctor", "that doctor"),
    Person("那个学生", "that student", "that student"),
)
# "My friend" and "that doctor" may be a he or a she, so a second clause cannot take them up in one right way.
NAMED = tuple(p for p in PEOPLE if p.en not in ("my friend", "that teacher", "that doctor", "that student"))

THINGS = {
    thing.en: thing
    for thing in (
        Thing("书", "本", "book"),
        Thing("杂志", "本", "magazine"),
        Thing("字典", "本", "dictionary", plural="dictionaries"),
        Thing("报纸", "份", "newspaper"),
        Thing("信", "封", "letter"),
        Thing("故事", "个", "story", plural="stories"),
        Thing("诗", "首", "poem"),
        Thing("歌", "首", "song"),
        Thing("电影", "部", "movie"),
        Thing("照片", "张", "photo"),
        Thing("票", "张", "ticket"),
        Thing("地图", "张", "map"),
        Thing("苹果", "个", "apple"),
        Thing("鸡蛋", "个", "egg"),
        Thing("香蕉", "根", "banana"),
        Thing("面包", "块", "bread", unit="piece"),
        Thing("蛋糕", "块", "cake", unit="piece"),
        Thing("面条", "碗", "noodles", unit="bowl"),
        Thing("米饭", "碗", "rice", unit="bowl"),
        Thing("茶", "杯", "tea", unit="cup"),
        Thing("咖啡", "杯", "coffee", unit="cup"),
        Thing("水", "杯", "water", unit="glass"),
        Thing("牛奶", "杯", "milk", unit="glass"),
        Thing("啤酒", "瓶", "beer", unit="bottle"),
        Thing("自行车", "辆", "bicycle"),
        Thing("汽车", "辆", "car"),
        Thing("雨伞", "把", "umbrella"),
        Thing("椅子", "把", "chair"),
        Thing("桌子", "张", "table"),
        Thing("帽子", "顶", "hat"),
        Thing("衬衫", "件", "shirt"),
        Thing("裙子", "条", "skirt"),
        Thing("鞋", "双", "shoes", unit="pair"),
        Thing("手机", "部", "phone"),
        Thing("电脑", "台", "computer"),
        Thing("猫", "只", "cat"),
        Thing("狗", "条", "dog"),
        Thing("鸟", "只", "bird"),
        Thing("马", "匹", "horse"),
        Thing("鱼", "条", "fish", plural="fish"),
    )
}

READ = ("book", "magazine", "newspaper", "letter", "story", "poem")
EAT = ("apple", "egg", "banana", "bread", "cake", "noodles", "rice")
DRINK = ("tea", "coffee", "water", "milk", "beer")
WARES = (
    "book", "magazine", "dictionary", "newspaper", "ticket", "map", "apple", "banana", "bicycle", "car", "umbrella",
    "chair", "table", "hat", "shirt", "skirt", "shoes", "phone", "computer", "cat", "dog", "horse", "fish",
)  # fmt: skip
LOST = (
    "book", "magazine", "dictionary", "newspaper", "ticket", "map", "umbrella", "hat", "shirt", "skirt", "shoes",
    "phone", "photo", "letter", "cat", "dog",
)  # fmt: skip
VERBS = (
    Verb("读", "read", "reads", "read", "reading", READ, ("library", "home", "school", "park")),
    Verb(
        "写", "write", "writes", "wrote", "writing", ("letter", "story", "poem", "book"), ("library", "home", "school")
    ),
    Verb("买", "buy", "buys", "bought", "buying", WARES, ("shop",)),
    Verb("卖", "sell", "sells", "sold", "selling", WARES, ("shop",)),
    Verb("吃", "eat", "eats", "ate", "eating", EAT, ("home", "school", "park", "restaurant")),
    Verb("喝", "drink", "drinks", "drank", "drinking", DRINK, ("home", "restaurant", "park")),
    Verb("唱", "sing", "sings", "sang", "singing", ("song",), ("home", "school", "park")),
    Verb("画", "draw", "draws", "drew", "drawing", ("map", "cat", "dog", "bird", "horse", "fish"), ("home", "school")),
    Verb("看", "watch", "watches", "watched", "watching", ("movie",), ("home", "school")),
    Verb("找", "look for", "looks for", "looked for", "looking for", LOST, ("home", "school")),
)

PLACES = {  # for "at", after 在
    "home": ("家里", "at home"),
    "school": ("学校", "at school"),
    "library": ("图书馆", "in the library"),
    "park": ("公园", "in the park"),
    "shop": ("商店", "in the shop"),
    "restaurant": ("饭馆", "in the restaurant"),
}
GOALS = {
    "home": ("回家", "go home", "goes home", "went home"),
    "school": ("去学校", "go to school", "goes to school", "went to school"),
    **{
        place: (f"去{zh}", f"go to the {place}", f"goes to the {place}", f"went to the {place}")
        for place, zh in {
            "library": "图书馆", "park": "公园", "shop": "商店", "restaurant": "饭馆", "hospital": "医院",
            "station": "火车站", "bank": "银行", "museum": "博物馆",
        }.items()
    },
}  # fmt: skip
CITIES = (("北京", "Beijing"), ("上海", "Shanghai"), ("南京", "Nanjing"), ("广州", "Guangzhou"), ("西安", "Xi'an"))
VEHICLES = (("坐火车", "by train"), ("坐飞机", "by plane"), ("坐公共汽车", "by bus"), ("开车", "by car"))
PAST = (
    ("昨天", "yesterday"),
    ("前天", "the day before yesterday"),
    ("昨天晚上", "last night"),
    ("上个星期", "last week"),
    ("上个月", "last month"),
    ("去年", "last year"),
)
FUTURE = (
    ("明天", "tomorrow"),
    ("后天", "the day after tomorrow"),
    ("明天早上", "tomorrow morning"),
    ("下个星期", "next week"),
    ("下个月", "next month"),
)
HABIT = (
    ("每天", "every day"),
    ("每天早上", "every morning"),
    ("每天晚上", "every evening"),
    ("每个星期天", "every Sunday"),
)
HOURS = tuple(zip("五六七八九十", ("five", "six", "seven", "eight", "nine", "ten"), strict=True))
ADJECTIVES = (
    ("贵", "expensive", "more expensive", WARES),
    ("便宜", "cheap", "cheaper", WARES),
    ("旧", "old", "older", ("book", "map", "bicycle", "car", "chair", "table", "hat", "shoes", "phone", "computer")),
    ("漂亮", "beautiful", "more beautiful", ("photo", "hat", "shirt", "skirt", "shoes", "cat", "bird", "horse", "car")),
    (
        "大",
        "big",
        "bigger",
        ("apple", "umbrella", "chair", "table", "hat", "cat", "dog", "bird", "horse", "fish", "map"),
    ),
    ("有意思", "interesting", "more interesting", ("book", "magazine", "story", "movie", "song", "poem", "letter")),
    ("长", "long", "longer", ("letter", "story", "poem", "song", "movie", "skirt", "fish")),
)
FEELINGS = (("累", "tired"), ("饿", "hungry"), ("高兴", "happy"), ("忙", "busy"), ("生气", "angry"), ("冷", "cold"))
SKILLS = (
    ("游泳", "swim", "swimming"),
    ("跳舞", "dance", "dancing"),
    ("唱歌", "sing", "singing"),
    ("做饭", "cook", "cooking"),
    ("开车", "drive", "driving"),
    ("画画", "draw", "drawing"),
    ("说法语", "speak French", "speaking French"),
    ("说英语", "speak English", "speaking English"),
    ("说汉语", "speak Chinese", "speaking Chinese"),
)
SPOTS = (
    ("桌子上", "on the table"),
    ("桌子下面", "under the table"),
    ("椅子上", "on the chair"),
    ("床下面", "under the bed"),
    ("门后面", "behind the door"),
    ("房间里", "in the room"),
)
SMALL = (
    "book",
    "magazine",
    "dictionary",
    "newspaper",
    "letter",
    "photo",
    "ticket",
    "map",
    "hat",
    "shirt",
    "phone",
    "cat",
)
WEATHER_PAST = (("下雨了", "it rained"), ("下雪了", "it snowed"), ("天气很好", "the weather was fine"))
WEATHER_FUTURE = (("下雨", "it rains"), ("下雪", "it snows"), ("天气好", "the weather is fine"))
AGES = (
    ("十", "ten"), ("十二", "twelve"), ("十五", "fifteen"), ("十八", "eighteen"), ("二十", "twenty"),
    ("三十", "thirty"), ("四十", "forty"), ("五十", "fifty"), ("六十", "sixty"),
)  # fmt: skip

Pair = tuple[str, str]  # English, Chinese


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def _this(thing: Thing, near: bool) -> tuple[str, str]:
    """这本书 / this book, 那杯茶 / that cup of tea."""
    english = f"{thing.unit} of {thing.en}" if thing.unit else thing.en
    return f"{'这' if near else '那'}{thing.measure}{thing.zh}", f"{'this' if near else 'that'} {english}"


def _deeds() -> Iterator[tuple[Verb, Thing]]:
    return ((verb, THINGS[name]) for verb in VERBS for name in verb.things)


def past() -> Iterator[Pair]:
    """我昨天买了三本书。"""
    for who, (verb, thing), (when_zh, when), number in product(PEOPLE, _deeds(), PAST, (1, 2, 3, 4, 5)):
        things_zh, things = thing.counted(number)
        yield f"{who.en} {verb.past} {things} {when}.", f"{who.zh}{when_zh}{verb.zh}了{things_zh}。"


def past_denied() -> Iterator[Pair]:
    """她昨天没有喝咖啡。"""
    for who, (verb, thing), (when_zh, when) in product(PEOPLE, _deeds(), PAST):
        yield f"{who.en} did not {verb.base} any {thing.many} {when}.", f"{who.zh}{when_zh}没有{verb.zh}{thing.zh}。"


def future() -> Iterator[Pair]:
    """我明天要买一本书。"""
    for who, (verb, thing), (when_zh, when), number in product(PEOPLE, _deeds(), FUTURE, (1, 2, 3)):
        things_zh, things = thing.counted(number)
        yield f"{who.en} {who.be} going to {verb.base} {things} {when}.", f"{who.zh}{when_zh}要{verb.zh}{things_zh}。"


def wish() -> Iterator[Pair]:
    """他想吃一个苹果。 她不想买帽子。 你想喝茶吗？"""
    for who, (verb, thing), number in product(PEOPLE, _deeds(), (1, 2)):
        things_zh, things = thing.counted(number)
        want = "wants" if who.third else "want"
        yield f"{who.en} {want} to {verb.base} {things}.", f"{who.zh}想{verb.zh}{things_zh}。"
    for who, (verb, thing) in product(PEOPLE, _deeds()):
        do = "does" if who.third else "do"
        yield f"{who.en} {do} not want to {verb.base} {thing.many}.", f"{who.zh}不想{verb.zh}{thing.zh}。"
        if who is not ME:
            yield f"{do} {who.en} want to {verb.base} {thing.many}?", f"{who.zh}想{verb.zh}{thing.zh}吗？"


def taste() -> Iterator[Pair]:
    """我喜欢喝茶。 他不喜欢写信。"""
    for who, (verb, thing) in product(PEOPLE, _deeds()):
        if verb.base in ("look for", "sell"):
            continue
        like, do = ("likes", "does") if who.third else ("like", "do")
        yield f"{who.en} {like} {verb.gerund} {thing.many}.", f"{who.zh}喜欢{verb.zh}{thing.zh}。"
        yield f"{who.en} {do} not like {verb.gerund} {thing.many}.", f"{who.zh}不喜欢{verb.zh}{thing.zh}。"


def progress() -> Iterator[Pair]:
    """他正在图书馆读书。 她正在家里看电影。"""
    for who, (verb, thing) in product(PEOPLE, _deeds()):
        for place in verb.places:
            where_zh, where = PLACES[place]
            yield (
                f"{who.en} {who.be} {verb.gerund} {thing.many} {where}.",
                f"{who.zh}正在{where_zh}{verb.zh}{thing.zh}。",
            )


def habit() -> Iterator[Pair]:
    """我每天早上在家里喝咖啡。"""
    daily = [(verb, thing) for verb, thing in _deeds() if verb.base in ("read", "eat", "drink", "sing", "write")]
    for who, (verb, thing), (when_zh, when) in product(PEOPLE, daily, HABIT):
        for place in verb.places:
            where_zh, where = PLACES[place]
            yield (
                f"{who.en} {verb.present(who)} {thing.many} {where} {when}.",
                f"{who.zh}{when_zh}在{where_zh}{verb.zh}{thing.zh}。",
            )


def questions() -> Iterator[Pair]:
    """你昨天买了什么？ 谁吃了那个苹果？ 他买了几本书？"""
    for who, verb, (when_zh, when) in product(PEOPLE, VERBS, PAST):
        yield f"what did {who.en} {verb.base} {when}?", f"{who.zh}{when_zh}{verb.zh}了什么？"
    for (verb, thing), near in product(_deeds(), (True, False)):
        this_zh, this = _this(thing, near)
        yield f"who {verb.past} {this}?", f"谁{verb.zh}了{this_zh}？"
        yield f"where did you {verb.base} {this}?", f"你在哪里{verb.zh}了{this_zh}？"
    for who, (verb, thing) in product(PEOPLE, _deeds()):
        many = f"{thing.units} of {thing.en}" if thing.unit else thing.many
        yield f"how many {many} did {who.en} {verb.base}?", f"{who.zh}{verb.zh}了几{thing.measure}{thing.zh}？"


def gifts() -> Iterator[Pair]:
    """他给了我两张票。"""
    for giver, taker, name, number in product(PEOPLE, PEOPLE, WARES, (1, 2, 3)):
        if giver is taker or giver.person == taker.person != 3:
            continue
        things_zh, things = THINGS[name].counted(number)
        yield f"{giver.en} gave {taker.object_en} {things}.", f"{giver.zh}给了{taker.zh}{things_zh}。"


def owning() -> Iterator[Pair]:
    """我有两条狗。 她没有自行车。"""
    for who, name, number in product(PEOPLE, WARES, (1, 2, 3, 4, 5)):
        things_zh, things = THINGS[name].counted(number)
        yield f"{who.en} {'has' if who.third else 'have'} {things}.", f"{who.zh}有{things_zh}。"
    for who, name in product(PEOPLE, WARES):
        thing, do = THINGS[name], "does" if who.third else "do"
        yield f"{who.en} {do} not have any {thing.many}.", f"{who.zh}没有{thing.zh}。"


def looks() -> Iterator[Pair]:
    """这本书很有意思。 那件衬衫太贵了。 这匹马比那匹马漂亮。"""
    for (adjective_zh, adjective, more, names), near in product(ADJECTIVES, (True, False)):
        for name in names:
            this_zh, this = _this(THINGS[name], near)
            other_zh, other = _this(THINGS[name], not near)
            yield f"{this} is very {adjective}.", f"{this_zh}很{adjective_zh}。"
            yield f"{this} is too {adjective}.", f"{this_zh}太{adjective_zh}了。"
            # 有 is the one word that 不 does not deny.
            denied_zh = f"没{adjective_zh}" if adjective_zh.startswith("有") else f"不{adjective_zh}"
            yield f"{this} is not {adjective}.", f"{this_zh}{denied_zh}。"
            yield f"is {this} {adjective}?", f"{this_zh}{adjective_zh}吗？"
            yield f"{this} is {more} than {other}.", f"{this_zh}比{other_zh}{adjective_zh}。"


def places() -> Iterator[Pair]:
    """那只猫在椅子上。 你的书在桌子上吗？"""
    for name, (spot_zh, spot), near in product(SMALL, SPOTS, (True, False)):
        this_zh, this = _this(THINGS[name], near)
        yield f"{this} is {spot}.", f"{this_zh}在{spot_zh}。"
        yield f"is {this} {spot}?", f"{this_zh}在{spot_zh}吗？"
    for name, (spot_zh, spot), number in product(SMALL, SPOTS, (1, 2, 3)):
        things_zh, things = THINGS[name].counted(number)
        yield f"there {'is' if number == 1 else 'are'} {things} {spot}.", f"{spot_zh}有{things_zh}。"


def journeys() -> Iterator[Pair]:
    """我们下个月要坐火车去北京。 她昨天去了医院。 汤姆每天早上七点去学校。"""
    for who, (city_zh, city), (by_zh, by) in product(PEOPLE, CITIES, VEHICLES):
        for when_zh, when in FUTURE:
            yield f"{who.en} {who.be} going to go to {city} {by} {when}.", f"{who.zh}{when_zh}要{by_zh}去{city_zh}。"
        for when_zh, when in PAST:
            yield f"{who.en} went to {city} {by} {when}.", f"{who.zh}{when_zh}{by_zh}去了{city_zh}。"
    for who, (goal_zh, go, goes, went) in product(PEOPLE, GOALS.values()):
        for when_zh, when in PAST:
            done_zh = f"{goal_zh[0]}了{goal_zh[1:]}"
            yield f"{who.en} {went} {when}.", f"{who.zh}{when_zh}{done_zh}。"
            yield f"{who.en} did not {go} {when}.", f"{who.zh}{when_zh}没有{goal_zh}。"
        for (habit_zh, habit_en), (hour_zh, hour) in product(HABIT[1:3], HOURS):
            yield (
                f"{who.en} {goes if who.third else go} at {hour} o'clock {habit_en}.",
                f"{who.zh}{habit_zh}{hour_zh}点{goal_zh}。",
            )


def reasons() -> Iterator[Pair]:
    """因为下雨了，所以他没有去学校。 如果明天下雪，我就不去公园。 虽然她很累，但是她去了学校。"""
    for who, (goal_zh, go, _, went) in product(NAMED, GOALS.values()):
        done_zh = f"{goal_zh[0]}了{goal_zh[1:]}"
        he_zh, he = who.pronoun
        for weather_zh, weather in WEATHER_PAST[:2]:
            yield f"because {weather}, {who.en} did not {go}.", f"因为{weather_zh}，所以{who.zh}没有{goal_zh}。"
        for weather_zh, weather in WEATHER_PAST[2:]:
            yield f"because {weather}, {who.en} {went}.", f"因为{weather_zh}，所以{who.zh}{done_zh}。"
        for weather_zh, weather in WEATHER_FUTURE[:2]:
            yield f"if {weather} tomorrow, {who.en} will not {go}.", f"如果明天{weather_zh}，{who.zh}就不{goal_zh}。"
        for weather_zh, weather in WEATHER_FUTURE[2:]:
            yield f"if {weather} tomorrow, {who.en} will {go}.", f"如果明天{weather_zh}，{who.zh}就{goal_zh}。"
        for feeling_zh, feeling in FEELINGS:
            yield (
                f"although {who.en} {who.was} {feeling}, {he} {went}.",
                f"虽然{who.zh}很{feeling_zh}，但是{he_zh}{done_zh}。",
            )


def states() -> Iterator[Pair]:
    """我很累。 他们不忙。 她会游泳。 汤姆今年二十岁。"""
    for who, (feeling_zh, feeling) in product(PEOPLE, FEELINGS):
        yield f"{who.en} {who.be} very {feeling}.", f"{who.zh}很{feeling_zh}。"
        yield f"{who.en} {who.be} not {feeling}.", f"{who.zh}不{feeling_zh}。"
        if who is not ME:
            yield f"{who.be} {who.en} {feeling}?", f"{who.zh}{feeling_zh}吗？"
    for who, (skill_zh, skill, gerund) in product(PEOPLE, SKILLS):
        like = "likes" if who.third else "like"
        yield f"{who.en} can {skill}.", f"{who.zh}会{skill_zh}。"
        yield f"{who.en} cannot {skill}.", f"{who.zh}不会{skill_zh}。"
        yield f"{who.en} {like} {gerund}.", f"{who.zh}喜欢{skill_zh}。"
        if who is not ME:
            yield f"can {who.en} {skill}?", f"{who.zh}会{skill_zh}吗？"
    for who, (age_zh, age) in product(PEOPLE, AGES):
        if not who.plural:
            yield f"{who.en} {who.be} {age} years old.", f"{who.zh}今年{age_zh}岁。"


# How many of the corpus's pairs each template gives; small templates give all that they have.
TEMPLATES = (
    (past, 900), (past_denied, 450), (future, 700), (wish, 600), (taste, 350), (progress, 400), (habit, 400),
    (questions, 500), (gifts, 350), (owning, 350), (looks, 250), (places, 200), (journeys, 600), (reasons, 450),
    (states, 350),
)  # fmt: skip


def sample_pairs() -> list[Pair]:
    """The `PAIRS` pairs, English and Chinese, sorted by English length as the real file is."""
    chosen: list[Pair] = []
    english_seen: set[str] = set()
    chinese_seen: set[str] = set()
    for template, share in TEMPLATES:
        taken = 0
        # The order of a hash is a shuffle that is the same everywhere; random's own shuffle is not promised to be.
        for english, chinese in sorted(template(), key=lambda pair: hashlib.sha256(pair[1].encode()).digest()):
            english = english[0].upper() + english[1:]
            if taken == share or len(chosen) == PAIRS:
                break
            if english not in english_seen and chinese not in chinese_seen:
                english_seen.add(english)
                chinese_seen.add(chinese)
                chosen.append((english, chinese))
                taken += 1
    return sorted(chosen, key=lambda pair: (len(pair[0]), pair))


def sample_lines() -> list[str]:
    """The corpus in the form of the real file: `English TAB Chinese TAB attribution`."""
    return [f"{english}\t{chinese}\t{ATTRIBUTION}" for english, chinese in sample_pairs()]
