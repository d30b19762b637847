import { expect, test } from 'vitest'
import * as units from '../src/units'
import table from './units.json'

test.each(table as [keyof typeof units, number, string][])('%s(%s) is %s, as Python writes it', (name, value, words) => {
  expect(units[name](value)).toBe(words)
})

test('numbers are grouped the same in every language, and shares are whole percents', () => {
  expect([0, 999, 1412, 8030261248].map(units.formatNumber)).toEqual(['0', '999', '1,412', '8,030,261,248'])
  expect([0, 0.274, 0.996, 1].map(units.formatPercent)).toEqual(['0 %', '27 %', '100 %', '100 %'])
})
