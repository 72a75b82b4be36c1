// What a layer may have besides, each a room of its own.
// Gives: what they give. Needs: train_moe.c, which includes it twice: inside Config, for the fields of their options
// (CONFIG_FIELDS), and before the layers are put together.
#include "lora.h"     // --lora: low-rank pairs beside frozen matrices
#include "qk_norm.h"  // --qk-norm: queries and keys with a norm of their own
#include "lookup.h"   // --value-embedding: each word has a vector that is added to its values
#include "ngrams.h"   // --ngrams: each pair of words has one, and each triple, before layer 0 and in each layer
#include "residual.h" // --norms, --dropout, --moe-sigmoid: what stands between a layer's halves and the residual stream
