# Turns the CUDA C++ of train_moe.cu into C++ for cuda_runtime.h of this folder; a line stays a line.
#
#   name<args><<<grid, block, shared, stream>>>(   cudacpu::launch("name<args>", name<args>, grid, block, shared, stream)(
#   __shared__ T name[A][B];                       auto &name = cudacpu::shared<T[A][B]>(__LINE__, __PRETTY_FUNCTION__);
#   __shared__ __align__(16) T name[A];            auto &name = cudacpu::shared<T[A], 16>(__LINE__, __PRETTY_FUNCTION__);
#   extern __shared__ T name[];                    T *name = cudacpu::dynamic_shared<T>();
#
# A kernel's name, its arguments in <>, and all of <<<...>>>( stand on one line, a __shared__ variable on one of its own.

s/([A-Za-z_][A-Za-z0-9_:]*(<([^<>]|<[^<>]*>)*>)?)<<<(([^>]|>[^>]|>>[^>])*)>>>\(/cudacpu::launch("\1", \1, \4)(/g
s/extern +__shared__ +((__align__|alignas)\([^)]*\) +)?([A-Za-z_][A-Za-z0-9_:<>, ]*[^ ]) +([A-Za-z_][A-Za-z0-9_]*)\[\] *;/\3 *\4 = cudacpu::dynamic_shared<\3>();/
s/__shared__ +(__align__|alignas)\(([^)]*)\) +([A-Za-z_][A-Za-z0-9_:<>,* ]*[ *])([A-Za-z_][A-Za-z0-9_]*)((\[[^]]*\])*) *;/auto \&\4 = cudacpu::shared<\3\5, \2>(__LINE__, __PRETTY_FUNCTION__);/
s/__shared__ +([A-Za-z_][A-Za-z0-9_:<>,* ]*[ *])([A-Za-z_][A-Za-z0-9_]*)((\[[^]]*\])*) *;/auto \&\2 = cudacpu::shared<\1\3>(__LINE__, __PRETTY_FUNCTION__);/
