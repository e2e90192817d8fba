"""placeholder until merged"""

NAME = "trl"
ABOUT = "TRL's own command on fastdpop: fastdpop trl dpo ..."


def run(argv):
    return 1
