// The emulation stands in for the CPU's library, whose masks need no kernel.
#include "../../cpu/masked_landmarks.cpp"
