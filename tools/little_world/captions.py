"""What a scene shows, in English and in Chinese words.

A phrase is an English and a Chinese text of the same meaning. Chinese is written with `|` between
its words, of which the vocabulary is made; `caption` leaves them out. `{}` takes the name of a
colour or of a tree.
"""

import random
from collections.abc import Callable

from .scenes import Scene

Phrase = tuple[str, str]
Keep = Callable[[float], bool]  # whether to tell of something that is told of this often

COLOURS = {  # without its last sign it is a colour too
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "blue": "蓝色",
    "purple": "紫色",
    "pink": "粉色",
    "white": "白色",
}
NUMBERS = {1: ("a", "一"), 2: ("two", "两"), 3: ("three", "三"), 4: ("four", "四")}
PLACES = {"left": "左边", "middle": "中间", "right": "右边"}

CITY = [
    ("a futuristic city street", "未来|城市|街道"),
    ("a cyberpunk city street", "赛博朋克|城市|街道"),
    ("a futuristic cyberpunk city street", "赛博朋克|风格|的|未来|城市|街道"),
    ("a cyberpunk style futuristic city street", "赛博朋克|风格|的|未来|城市|街道"),
    ("a cyberpunk city", "赛博朋克|城市"),
    ("a futuristic city", "未来|城市"),
    ("a neon city", "霓虹|城市"),
    ("a city street", "城市|街道"),
    ("a city", "城市"),
    ("the street of a big city", "大|城市|的|街道"),
    ("a sci-fi metropolis", "科幻|都市"),
    ("skyscrapers", "高楼|大厦"),
    ("a street between high buildings", "高楼|之间|的|街道"),
    ("a road through the city", "城市|里|的|道路"),
]
CITY_TIME = {
    ("night", True): [
        ("rainy night", "雨|夜"),
        ("a rainy night", "下雨|的|夜晚"),
        ("at night in the rain", "夜晚|下雨"),
        ("rain at night", "雨|中|的|夜晚"),
    ],
    ("night", False): [
        ("at night", "夜晚"),
        ("night", "夜|里"),
        ("a clear night", "晴朗|的|夜晚"),
        ("a dry night", "干燥|的|夜晚"),
    ],
    ("sunset", True): [
        ("rainy sunset", "下雨|的|日落"),
        ("sunset in the rain", "雨|中|的|日落"),
        ("a rainy evening", "下雨|的|傍晚"),
    ],
    ("sunset", False): [
        ("at sunset", "日落|时分"),
        ("sunset", "日落"),
        ("in the evening", "傍晚"),
        ("a clear evening sky", "晴朗|的|傍晚|天空"),
    ],
}
NEON = [
    ("{} and {} neon lights", "{}|和|{}|的|霓虹|灯光"),
    ("{} and {} neon signs", "{}|和|{}|的|霓虹|招牌"),
    ("{} and {} neon", "{}|和|{}|霓虹"),
    ("neon lights in {} and {}", "{}|和|{}|的|霓虹灯"),
]
NEON_REFLECTED = [
    (
        "{} and {} neon lights reflected on the wet ground",
        "{}|和|{}|的|霓虹|灯光|反射|在|湿漉漉|的|地面|上",
    ),
    (
        "{} and {} neon signs reflected on the wet street",
        "{}|和|{}|的|霓虹|招牌|倒影|在|湿漉漉|的|街道|上",
    ),
]
NEON_PLAIN = [
    ("neon lights", "霓虹|灯光"),
    ("glowing neon signs", "发光|的|霓虹|招牌"),
    ("neon", "霓虹灯"),
]
GROUND = {
    True: [
        ("wet street with reflections", "湿漉漉|的|街道|倒影"),
        ("reflections on the wet road", "湿漉漉|的|地面|上|的|倒影"),
        ("wet ground", "湿漉漉|的|地面"),
        ("a reflection in the puddles", "积水|倒影"),
    ],
    False: [("dry street", "干燥|的|街道"), ("dry road", "干燥|的|地面")],
}
TIME = {
    "day": [("by day", "白天"), ("in the daytime", "白天"), ("daylight", "日光")],
    "sunset": [
        ("at sunset", "日落|时分"),
        ("sunset", "日落"),
        ("in the evening", "傍晚"),
        ("evening sky", "傍晚|的|天空"),
        ("at dusk", "黄昏"),
        ("twilight", "暮色"),
    ],
    "night": [
        ("at night", "夜晚"),
        ("night", "夜|里"),
        ("dark night", "黑夜"),
        ("dark", "夜色"),
        ("night sky", "夜|空"),
    ],
}
LIGHT = {
    ("day", "sun"): [
        ("under a bright sun", "明亮|的|太阳"),
        ("the sun is shining", "太阳|照|着"),
        ("sun", "太阳"),
    ],
    ("sunset", "sun"): [
        ("the setting sun", "夕阳"),
        ("an orange sun", "橙色|的|太阳"),
        ("sun", "太阳"),
    ],
    ("night", "moon"): [
        ("at night under the moon", "夜晚|的|月亮"),
        ("in the moonlight", "月光|下"),
        ("moon and stars", "月亮|和|星星"),
        ("full moon", "满月"),
        ("a starry night", "星空|的|夜晚"),
        ("moon", "月亮"),
    ],
}
WEATHER = {
    "clear": [
        ("clear sky", "晴朗|的|天空"),
        ("clear weather", "晴天"),
    ],
    "cloudy": [
        ("clouds", "云"),
        ("cloudy sky", "多云|的|天空"),
        ("cloudy", "多云"),
    ],
    "rain": [
        ("rain", "下雨"),
        ("in the rain", "雨|中"),
        ("rainy weather", "雨|天"),
        ("heavy rain", "大|雨"),
        ("it is raining", "下|着|雨"),
    ],
    "snow": [
        ("falling snow", "飘|雪"),
        ("snowfall", "下雪"),
        ("it is snowing", "下|着|雪"),
        ("snowflakes", "雪花"),
        ("heavy snow", "大|雪"),
    ],
}
TIME_AND_WEATHER = {
    ("day", "clear"): [
        ("a sunny day", "晴朗|的|白天"),
        ("sunny", "阳光|明媚"),
        ("blue sky", "蓝天"),
    ],
    ("day", "cloudy"): [("white clouds", "白|云"), ("a cloudy day", "多云|的|白天")],
    ("day", "rain"): [("a rainy day", "下雨|的|白天")],
    ("day", "snow"): [("a snowy day", "下雪|的|白天")],
    ("night", "clear"): [("a clear night", "晴朗|的|夜晚")],
    ("night", "rain"): [("a rainy night", "下雨|的|夜晚"), ("rainy night", "雨|夜")],
    ("night", "snow"): [("a snowy night", "下雪|的|夜晚"), ("snowy night", "雪|夜")],
}
SEASON = {
    "summer": [("summer", "夏天"), ("in summer", "夏|日")],
    "autumn": [("autumn", "秋天"), ("in autumn", "秋|日"), ("autumn colors", "秋天|的|颜色")],
    "winter": [
        ("winter", "冬天"),
        ("in winter", "冬|日"),
        ("snow", "雪"),
        ("snow on the ground", "地面|上|有|雪"),
        ("snow-covered ground", "积雪"),
        ("snowy ground", "雪地"),
        ("a snowy landscape", "雪|景"),
    ],
}
HILLS = {
    "summer": [("green hills", "绿色|的|山丘"), ("a green hill", "绿色|的|丘陵")],
    "autumn": [("autumn hills", "秋天|的|山丘"), ("an autumn hill", "秋天|的|丘陵")],
    "winter": [("snowy hills", "雪|山丘"), ("a snowy hill", "雪|丘陵")],
}
ANY_HILLS = [("hills", "山丘"), ("hills in the background", "背景|是|山丘")]
MOUNTAINS = [
    ("mountains", "山"),
    ("mountains in the background", "背景|是|高山"),
    ("high mountains", "高山"),
    ("a mountain range", "群山"),
    ("snowy mountains", "雪|山"),
]
MEADOW = [
    ("a meadow", "草地"),
    ("in the countryside", "乡村"),
    ("a field", "田野"),
    ("grassland", "草原"),
    ("a country landscape", "乡村|风景"),
]
HOUSES = [
    ("house", "房子"),
    ("house", "房屋"),
    ("home", "家"),
    ("cottage", "小屋"),
    ("cabin", "屋子"),
]
CARS = [("car", "汽车"), ("car", "车"), ("small car", "小|汽车"), ("car", "轿车")]
FLYING_CARS = [
    ("flying car", "飞行|汽车"),
    ("flying car", "飞行|汽车"),
    ("flying vehicle", "飞行|车辆"),
    ("hover car", "悬浮|车"),
]
BOATS = [("sailing boat", "帆船"), ("sailboat", "帆船"), ("boat", "船"), ("boat", "小船")]
TREES = {
    "pine": [("pine tree", "松树"), ("pine", "松树"), ("fir tree", "杉树")],
    "round": [("round tree", "圆形|的|树"), ("leafy tree", "大|树")],
}
SEA = [
    ("the sea", "大海"),
    ("on the sea", "海|上"),
    ("the ocean", "海洋"),
    ("water", "水|面"),
    ("waves", "海浪"),
]
EXTRAS = [
    ("high-tech atmosphere", "高科技|氛围"),
    ("rich details", "细节|丰富"),
    ("cinematic wide shot", "电影感|宽幅|画面"),
    ("flat illustration", "扁平|插画"),
    ("beautiful", "美丽"),
    ("best quality", "最佳|质量"),
    ("high quality", "高质量"),
    ("masterpiece", "杰作"),
    ("highly detailed", "高清"),
    ("cartoon", "卡通"),
    ("digital art", "数字|艺术"),
    ("colorful", "色彩|鲜艳"),
    ("a picture", "图片"),
    ("4k", "4k"),
]
LETTERS = "aeioubdfgklmnprst"  # of words that mean nothing
SIGNS = "猫狗鱼鸟龙虎马羊牛鸡"  # and signs, which no vocabulary here has


def caption(scene: Scene, r: random.Random, chinese: bool, whole: bool = False) -> str:
    """Some of what the scene shows, in any order; all of it, and nothing else, if `whole`."""
    parts = [phrase[chinese] for phrase in phrases(scene, r, whole)]
    if not whole and len(parts) < 7 and r.random() < 0.05:
        parts.insert(r.randrange(len(parts) + 1), _nonsense(r, chinese))
    comma = r.choice("，，，,") if chinese else ", "
    text = comma.join(parts).replace("|", "")
    if not chinese:
        text = text.replace("a orange", "an orange")
    if not whole and r.random() < 0.3:
        text = text[0].upper() + text[1:] + ("。" if chinese else ".")
    return text


def phrases(scene: Scene, r: random.Random, whole: bool = False) -> list[Phrase]:
    """What `caption` is made of."""

    def keep(often: float) -> bool:
        return whole or r.random() < often

    parts = _in_city(scene, r, keep) if scene.kind == "city" else _in_country(scene, r, keep)
    if whole:
        return parts
    if r.random() < 0.4:
        r.shuffle(parts)
    if len(parts) < 7:
        parts += r.sample(EXTRAS, r.choice((0, 0, 0, 0, 1, 2, 3)))
    return parts


def _in_city(scene: Scene, r: random.Random, keep: Keep) -> list[Phrase]:
    parts = [r.choice(CITY)]
    if keep(0.85):
        parts.append(r.choice(CITY_TIME[scene.time, scene.wet]))
    if keep(0.9):
        reflected = scene.wet and r.random() < 0.5
        names = r.sample(scene.neon, 2)
        parts.append(_filled(r.choice(NEON_REFLECTED if reflected else NEON), *names))
    elif r.random() < 0.5:
        parts.append(r.choice(NEON_PLAIN))
    if keep(0.25):
        parts.append(r.choice(GROUND[scene.wet]))
    if keep(0.9 if scene.flying_cars else 0.4):
        parts.append(_flying_cars(scene.flying_cars, r, counted=keep(0.8)))
    return parts


def _flying_cars(number: int, r: random.Random, counted: bool) -> Phrase:
    english, chinese = _several(number, r.choice(FLYING_CARS), "辆", r, counted)
    if number and r.random() < 0.4:
        return english + " overhead", "头顶|有|" + chinese
    if number and r.random() < 0.2:
        return english + " in the sky", "天空|中|有|" + chinese
    return english, chinese


def _in_country(scene: Scene, r: random.Random, keep: Keep) -> list[Phrase]:
    things = _at_sea(scene, r, keep) if scene.kind == "sea" else _in_meadow(scene, r, keep)
    sky = []
    both = TIME_AND_WEATHER.get((scene.time, scene.weather))
    if both and r.random() < 0.3:
        sky.append(r.choice(both))
    else:
        if keep(0.75):
            sky.append(r.choice(TIME[scene.time]))
        if keep(0.6):
            sky.append(r.choice(WEATHER[scene.weather]))
    if scene.light and keep(0.4):
        sky.append(r.choice(LIGHT[scene.time, scene.light]))
    if keep(0.65):
        sky.append(r.choice(SEASON[scene.season]))
    if scene.mountains and keep(0.75):
        sky.append(r.choice(MOUNTAINS))
    elif not scene.mountains and keep(0.4):
        sky.append(r.choice(HILLS[scene.season] + ANY_HILLS))
    r.shuffle(sky)
    return things + sky


def _in_meadow(scene: Scene, r: random.Random, keep: Keep) -> list[Phrase]:
    house = _one(r.choice(HOUSES), r.choice("座座间"), scene.house if keep(0.92) else "", r)
    things = [_placed(house, scene, r, keep)]
    if scene.car and keep(0.9):
        english, chinese = _one(r.choice(CARS), "辆", scene.car if keep(0.95) else "", r)
        if r.random() < 0.2:
            english, chinese = english + " on the road", "路|上|有|" + chinese
        things.append((english, chinese))
    elif not scene.car and r.random() < 0.08:
        things.append(("no car", "没有|汽车"))
    if keep(0.85):
        named = r.choice(TREES[scene.tree]) if scene.trees and keep(0.75) else ("tree", "树")
        english, chinese = _several(scene.trees, named, "棵", r, counted=keep(0.85))
        if scene.trees and r.random() < 0.12:
            english, chinese = english + " beside the house", "房子|旁边|有|" + chinese
        things.append((english, chinese))
    if len(things) > 1 and r.random() < 0.2 and "有" not in things[1][1]:
        things[:2] = [_joined(things[0], things[1], r)]
    if r.random() < 0.2:
        things.insert(0, r.choice(MEADOW))
    return things


def _at_sea(scene: Scene, r: random.Random, keep: Keep) -> list[Phrase]:
    noun = r.choice(BOATS)
    colour = scene.sails if keep(0.9) else ""
    if colour and r.random() < 0.3:
        english, chinese = _several(scene.boats, ("boat", "船"), "艘", r, counted=keep(0.85))
        sail = "a {} sail" if english.startswith("a ") else "{} sails"
        boats = english + " with " + sail.format(colour), f"{chinese}|有|{COLOURS[colour]}|的|帆"
    else:
        boats = _several(scene.boats, noun, "艘", r, keep(0.85), colour)
    where = r.choice(SEA)
    if r.random() < 0.4:
        things = [(boats[0] + " on the sea", "海|上|有|" + boats[1])]
    else:
        things = [where, boats] if r.random() < 0.6 else [boats]
    if scene.lighthouse and keep(0.9):
        things.append(_placed(("a lighthouse", "一|座|灯塔"), scene, r, keep))
    elif not scene.lighthouse and r.random() < 0.06:
        things.append(("no lighthouse", "没有|灯塔"))
    return things


def _filled(phrase: Phrase, *colours: str) -> Phrase:
    return phrase[0].format(*colours), phrase[1].format(*(COLOURS[name] for name in colours))


def _joined(first: Phrase, second: Phrase, r: random.Random) -> Phrase:
    return f"{first[0]} {r.choice(('and', 'with'))} {second[0]}", f"{first[1]}|和|{second[1]}"


def _coloured(noun: Phrase, colour: str, r: random.Random) -> Phrase:
    if not colour:
        return noun
    chinese = COLOURS[colour][0] if r.random() < 0.25 else COLOURS[colour] + "|的"
    return f"{colour} {noun[0]}", f"{chinese}|{noun[1]}"


def _one(noun: Phrase, measure: str, colour: str, r: random.Random) -> Phrase:
    english, chinese = _coloured(noun, colour, r)
    return "a " + english, f"一|{measure}|{chinese}"


def _several(
    number: int, noun: Phrase, measure: str, r: random.Random, counted: bool, colour: str = ""
) -> Phrase:
    """So many things; where they are not `counted` it may be said of two or more without it."""
    english, chinese = _coloured(noun, colour, r)
    if number != 1:
        english += "s"
    if number == 0:
        return f"no {english}", f"没有|{chinese}"
    if number > 1 and not counted:
        return english, chinese
    words = ("one", "一") if number == 1 and r.random() < 0.2 else NUMBERS[number]
    if r.random() < 0.06:
        words = str(number), str(number)
    return f"{words[0]} {english}", f"{words[1]}|{measure}|{chinese}"


def _placed(phrase: Phrase, scene: Scene, r: random.Random, keep: Keep) -> Phrase:
    if not keep(0.4):
        return phrase
    where = ("in the " if scene.place == "middle" else "on the ") + scene.place
    chinese = r.choice(("{1}|在|{0}", "{0}|有|{1}", "{0}|是|{1}"))
    return f"{phrase[0]} {where}", chinese.format(PLACES[scene.place], phrase[1])


def _nonsense(r: random.Random, chinese: bool) -> str:
    """A word that nobody knows, so that such words come to mean nothing."""
    if chinese:
        return "".join(r.sample(SIGNS, r.randint(1, 3)))
    return "".join(r.choice(LETTERS) for _ in range(r.randint(3, 7)))
