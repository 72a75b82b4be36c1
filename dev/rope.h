// Rotary positions for texts that are longer than those of the training (--rope-scaling): their frequencies, scaled once.
// Gives: scaled_frequency, head_angles. Needs: Config, rope_angles of train_moe.c, which includes it; head_width of
// mixers/attention_experts.h.
//
// linear: all frequencies are divided by --rope-factor (Chen et al. 2023, Extending Context Window of Large Language Models
// via Positional Interpolation). llama3: only the slow ones are (Llama Team 2024, The Llama 3 Herd of Models; the formula is
// that of transformers' modeling_rope_utils). Let n = original * frequency / 2 pi be how often a pair turns within a text of
// the --rope-original tokens that the model was first trained on. A pair with n < low is slow, one with n > high stays as it
// is, and between them the share s = (n - low) / (high - low) of the frequency stays, and 1 - s of it is divided.
#ifdef CONFIG_FIELDS
    int rope_scaling;
    double rope_factor, rope_low, rope_high;
    int rope_original;
#elif !defined(ROPE_H)
#define ROPE_H

int head_width(const Config *c); // mixers/attention_experts.h

double scaled_frequency(const Config *c, double frequency) {
    if (c->rope_scaling == ROPE_NONE) {
        return frequency;
    }
    double turns = c->rope_original * frequency / (2 * 3.141592653589793);
    double keeps = (turns - c->rope_low) / (c->rope_high - c->rope_low);
    keeps = c->rope_scaling == ROPE_LINEAR ? 0 : fmin(1, fmax(0, keeps));
    return (1 - keeps) * frequency / c->rope_factor + keeps * frequency;
}

// rope_angles() of a model's heads: angles (count, D/2, 2) for `count` positions from `first` on.
void head_angles(const Config *c, real *angles, int first, int count) {
    int D = head_width(c);
    rope_angles(angles, first, count, D, c->rope_theta);
    for (int i = 0; i < D / 2 && c->rope_scaling != ROPE_NONE; i++) {
        double frequency = scaled_frequency(c, pow(c->rope_theta, -2.0 * i / D));
        for (int t = 0; t < count; t++) {
            angles[(size_t)t * D + 2 * i] = (real)cos((first + t) * frequency);
            angles[(size_t)t * D + 2 * i + 1] = (real)sin((first + t) * frequency);
        }
    }
}

#endif
