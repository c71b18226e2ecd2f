// sessions ENGINE…: opens one engine after the other in one process; says what the runtime refuses, as the consumer does.
#include <ztp/session.h>

#include <iostream>

int main(int count, char** words) {
  try {
    for (int i = 1; i < count; ++i) const ztp::Session session(words[i]);
    return 0;
  } catch (const ztp::Error& error) {
    std::cerr << error.problem() << '\n';
    return error.exit_code();
  }
}
