"""Words, names and sentences that tasks are made of."""

from lmscale.data.synthetic.dice import Dice

QUALITIES = (
  'amber', 'ancient', 'ashen', 'bitter', 'blunt', 'bold', 'brisk', 'broad', 'calm', 'candid', 'clever', 'coarse', 'cosy', 'crisp', 'curved',
  'dapper', 'deep', 'dense', 'dim', 'dusty', 'eager', 'early', 'elder', 'even', 'faint', 'fair', 'fierce', 'flat', 'fluent', 'frosty',
  'gentle', 'gilded', 'glad', 'glossy', 'grand', 'green', 'hardy', 'hasty', 'hollow', 'honest', 'humble', 'icy', 'idle', 'jolly', 'keen',
  'kind', 'late', 'lean', 'light', 'lively', 'lofty', 'loud', 'lucid', 'mellow', 'mild', 'misty', 'modest', 'narrow', 'neat', 'nimble',
  'noble', 'oaken', 'odd', 'pale', 'patient', 'plain', 'polite', 'prompt', 'proud', 'quiet', 'rapid', 'rare', 'rigid', 'ripe', 'robust',
  'rough', 'round', 'rural', 'rusty', 'salty', 'sharp', 'shiny', 'silent', 'simple', 'sleepy', 'slim', 'smooth', 'solid', 'sour', 'spare',
  'stark', 'steady', 'stout', 'strict', 'subtle', 'sunny', 'supple', 'swift', 'tame', 'tender', 'thick', 'tidy', 'tough', 'urban', 'vague',
  'vast', 'velvet', 'vivid', 'warm', 'wary', 'wide', 'wild', 'wise', 'witty', 'woven', 'young',
)  # fmt: skip
THINGS = (
  'acorn', 'anchor', 'apron', 'arch', 'atlas', 'badge', 'banner', 'barrel', 'basin', 'beacon', 'bell', 'bench', 'blanket', 'boat', 'bottle',
  'bridge', 'bucket', 'button', 'cabin', 'candle', 'canoe', 'carpet', 'castle', 'cellar', 'chair', 'chimney', 'circle', 'clock', 'coast', 'coin',
  'compass', 'copper', 'cradle', 'crystal', 'curtain', 'desert', 'desk', 'door', 'drum', 'engine', 'feather', 'fence', 'ferry', 'field', 'flag',
  'flute', 'forest', 'fountain', 'garden', 'gate', 'glacier', 'glove', 'hammer', 'harbour', 'harvest', 'hill', 'island', 'jacket', 'jar', 'kettle',
  'ladder', 'lake', 'lantern', 'ledge', 'letter', 'lever', 'lock', 'loom', 'magnet', 'mantle', 'map', 'market', 'meadow', 'mill', 'mirror',
  'needle', 'oar', 'orchard', 'oven', 'paddle', 'parcel', 'pebble', 'pencil', 'piano', 'pillow', 'plate', 'pocket', 'quarry', 'rail', 'ribbon',
  'river', 'rope', 'saddle', 'sail', 'shelf', 'shovel', 'signal', 'spoon', 'stable', 'statue', 'stone', 'summit', 'table', 'tent', 'thread',
  'ticket', 'timber', 'tower', 'trail', 'tunnel', 'valley', 'vessel', 'village', 'violin', 'wagon', 'wheel', 'willow', 'window',
)  # fmt: skip
FIRST_NAMES = (
  'Ada', 'Alba', 'Amir', 'Anton', 'Asha', 'Bela', 'Bruno', 'Carla', 'Cyril', 'Dana', 'Darius', 'Edith', 'Elias', 'Emma', 'Farid', 'Flora',
  'Gavin', 'Greta', 'Hana', 'Hugo', 'Ida', 'Ivan', 'Jana', 'Jonas', 'Kamal', 'Karin', 'Lara', 'Leon', 'Linus', 'Lydia', 'Mara', 'Marcus',
  'Mina', 'Nadia', 'Nils', 'Noor', 'Olga', 'Omar', 'Oscar', 'Paula', 'Pedro', 'Petra', 'Quinn', 'Rahul', 'Rosa', 'Ruben', 'Sami', 'Sara',
  'Selma', 'Simon', 'Sofia', 'Tarek', 'Tessa', 'Theo', 'Uma', 'Ursula', 'Vera', 'Viktor', 'Wanda', 'Wim', 'Yara', 'Yusuf', 'Zoe', 'Zoltan',
)  # fmt: skip
SURNAMES = (
  ('Ald', 'Ash', 'Bar', 'Beck', 'Brad', 'Cal', 'Clay', 'Cran', 'Dal', 'Dun', 'East', 'Ell', 'Fair', 'Fen', 'Gar', 'Glen', 'Hal', 'Har', 'Hol', 'Kel',
   'Lang', 'Lin', 'Mal', 'Mar', 'Mil', 'Nor', 'Oak', 'Pem', 'Ray', 'Red', 'Rock', 'Sel', 'Shel', 'Stan', 'Thorn', 'Wal', 'War', 'West', 'Whit', 'Win'),
  ('bank', 'berg', 'bourne', 'bridge', 'brook', 'bury', 'by', 'combe', 'cott', 'dale', 'den', 'fell', 'field', 'ford', 'gate', 'ham', 'hurst', 'ley',
   'low', 'man', 'mere', 'more', 'ridge', 'shaw', 'stead', 'stone', 'ton', 'vale', 'wick', 'wood', 'worth', 'yard'),
)  # fmt: skip
NOISE = 'The road is long. The sky is clear. The wind is low. We walk on and the day goes by. '


def pairs(dice: Dice, n: int) -> list[str]:
  """n different words such as `quiet-lantern`; beyond what there is of them, with a number."""
  total = len(QUALITIES) * len(THINGS)
  found = dice.distinct(min(n, total), total)
  words = [f'{QUALITIES[i // len(THINGS)]}-{THINGS[i % len(THINGS)]}' for i in found]
  return words + [f'{words[i % total]}-{i // total + 1}' for i in range(total, n)]


def names(dice: Dice, n: int) -> list[str]:
  """n different full names: of 81,920, or where that is not many times n, of 27 times as many, most with a middle initial."""
  starts, ends = SURNAMES
  plain = len(FIRST_NAMES) * len(starts) * len(ends)
  sides = plain * 27

  def name(i: int) -> str:
    initial, rest = divmod(i, plain)
    first, rest = divmod(rest, len(starts) * len(ends))
    middle = f' {chr(64 + initial)}.' if initial else ''
    return f'{FIRST_NAMES[first]}{middle} {starts[rest // len(ends)]}{ends[rest % len(ends)]}'

  return [name(i) for i in dice.distinct(n, plain if 3 * n <= plain else sides)]
