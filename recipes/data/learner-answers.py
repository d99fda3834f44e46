"""Makes learner-answers.csv.gz: answers of learners who do not exist, by a stated model of learning. Run it to make it again.

The model is item response theory with growth. A learner has an ability in each skill, a = g + s with g ~ N(0, 1) of the
learner and s ~ N(0, 0.7) of learner and skill; every question of the skill that is answered adds 0.12. A question has a
difficulty b ~ N(0.2, 0.8) and a discrimination c ~ exp(N(0.3, 0.3)). It is answered right with probability
0.1 + 0.9 / (1 + exp(-c (a - b))), 0.1 being a lucky guess (the three-parameter logistic model, Birnbaum 1968). Questions
come in the order of the course, the skills taking turns, and after the last the first again; learners begin and end where
they like and skip one in twelve.
"""

import gzip
from pathlib import Path

import numpy as np

LEARNERS, QUESTIONS, SEED = 1500, 60, 7
SKILLS = ("fractions", "decimals", "percent", "ratio", "negative numbers")


def rows() -> list[str]:
    random = np.random.default_rng(SEED)
    difficulty = random.normal(0.2, 0.8, QUESTIONS)
    discrimination = np.exp(random.normal(0.3, 0.3, QUESTIONS))
    found = []
    for learner in range(1, LEARNERS + 1):
        ability = random.normal() + random.normal(0, 0.7, len(SKILLS))
        first, count = int(random.integers(QUESTIONS)), int(random.integers(12, 49))
        minute = int(random.integers(0, 500_000))
        for question in ((first + step) % QUESTIONS for step in range(count)):
            if random.random() < 1 / 12:
                continue
            skill = question % len(SKILLS)
            chance = 0.1 + 0.9 / (1 + np.exp(-discrimination[question] * (ability[skill] - difficulty[question])))
            said = "right" if random.random() < chance else "wrong"
            found.append(f"learner {learner},{SKILLS[skill]} {question // len(SKILLS) + 1} {said},{minute}")
            minute += int(random.integers(1, 30))
            ability[skill] += 0.12
    return found


if __name__ == "__main__":
    text = "learner,answer,minute\n" + "\n".join(rows()) + "\n"
    with gzip.GzipFile(Path(__file__).with_name("learner-answers.csv.gz"), "wb", mtime=0) as file:
        file.write(text.encode())
