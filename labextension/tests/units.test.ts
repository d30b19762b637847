import { expect, test } from 'vitest'
import * as units from '../src/units'
import table from './units.json'

test.each(table as [keyof typeof units, number, string][])('%s(%s) is %s, as Python writes it', (name, value, words) => {
  expect(units[name](value)).toBe(words)
})
