// Bundle the views into one ES module: node build.mjs [--watch]
import { build, context } from 'esbuild'

const options = {
  entryPoints: ['src/widget.ts'],
  outfile: '../llm_magic/static/views.js',
  bundle: true,
  format: 'esm',
  target: 'es2022',
  minify: true,
  charset: 'utf8',
  legalComments: 'none',
  logLevel: 'warning',
}

if (process.argv.includes('--watch')) await (await context(options)).watch()
else await build(options)
