// AVX-VNNI: AVX2 with the byte dot product; compiled with -mavxvnni, which selects `dot`.
#pragma once
#include "avx2.h"
#ifndef __AVXVNNI__
#error "compile with -mavxvnni"
#endif
