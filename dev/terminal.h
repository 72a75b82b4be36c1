// The terminal: whether a person reads there, how wide it is, a line that is written over and over.
// Gives: is_terminal, on_terminal, terminal_width, cut_columns, write_over. Needs: dev/util.h, which includes it.
#pragma once
#include <sys/ioctl.h>

// Can a line be written over there? Not on a terminal that knows no control codes (TERM=dumb).
int is_terminal(int file) {
    const char *kind = getenv("TERM");
    return isatty(file) && kind && kind[0] && strcmp(kind, "dumb") != 0;
}

// Does a person read standard output? Not under mpirun, whose pipes look like a terminal.
int on_terminal(void) {
    return !getenv("OMPI_COMM_WORLD_SIZE") && !getenv("PMI_SIZE") && is_terminal(1);
}

// Columns. It is asked for each line, because a window can be made wider and narrower.
int terminal_width(int file) {
    struct winsize size;
    memset(&size, 0, sizeof(size));
#ifdef TIOCGWINSZ
    ioctl(file, TIOCGWINSZ, &size);
#endif
    return size.ws_col > 0 ? size.ws_col : 80;
}

// Cuts a text in UTF-8 to so many characters, each of which takes a column. Returns how many it has.
int cut_columns(char *text, int width) {
    int columns = 0;
    for (; *text; text++) {
        int begins = ((unsigned char)*text & 0xc0) != 0x80; // the other bytes of a character have these bits
        if (begins && columns >= max_int(0, width)) {
            *text = 0;
            break;
        }
        columns += begins;
    }
    return columns;
}

// Writes line over the one that the terminal shows. A line that fills the last column may be wrapped, so it ends
// before. Where it is too long, its first `spare` characters, which must be ASCII, are left out, and then its end.
void write_over(FILE *to, char *line, int spare) {
    int width = terminal_width(fileno(to)) - 1;
    char *begin = line + (cut_columns(line, 1 << 30) > width ? spare : 0);
    cut_columns(begin, width);
    fprintf(to, "\r%s\033[K", begin);
}
